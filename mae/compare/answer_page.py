"""The HTML of an answer: the sentence, the table, and what they are measured on."""

from typing import Any

from mae.compare import verdict
from mae.inference import page


def section(results: dict[str, Any], without_labels: str) -> str:
    """Returns what the encoder is worth.

    Args:
        results: from `answer.compute`.
        without_labels: a sentence on what the model has learned without labels.
    """
    first, *others = results["sentences"]
    found = page.paragraph(first, "verdict") + page.table(*verdict.table(results))
    found += "".join(map(page.paragraph, [*others, verdict.note(results), without_labels]))
    if not verdict.others(results):
        found += page.paragraph("No released encoder was compared: a command below does it.")
    return found


def details(results: dict[str, Any]) -> str:
    """Returns the table of all classifiers."""
    return "<h3>All classifiers</h3>" + page.table(*verdict.table_of_uses(results))

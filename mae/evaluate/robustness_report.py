"""Scores of a classifier on a robustness suite: stored after each cell, and written as a table, CSV and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mae.evaluate import tables
from mae.evaluate.robustness import ALEXNET, CORRUPTIONS, IMAGES, PUBLISHED, SEVERITIES, corruption_errors
from mae.files import atomic
from mae.files.results import Results
from mae.settings.arguments import changes

# Scores of a cell: acc1, acc5 unless images have several labels, balanced_acc if the classes are imbalanced; and
# what they depend on: the number of images and the name of their folder.
Scores = dict[str, Any]
MEASURES = {"acc1": "Acc@1", "acc5": "Acc@5", "balanced_acc": "balanced accuracy"}


def cells_of(results: Results, settings: Mapping[str, Any]) -> dict[str, Scores]:
    """Returns the stored scores of the cells.

    Args:
        settings: the settings that the scores depend on, as values of JSON.

    Raises:
        ValueError: the file contains scores with other settings, or is damaged.
    """
    state = results.read()
    before = {"exif": False, **state.get("settings", {})}  # earlier versions recorded it if it was set
    if state and (difference := changes(before, settings)):
        raise ValueError(f"{results.path} contains the scores of another run ({difference}); give another `output_dir`")
    return state.get("cells", {})


def write(path: Path, suite: str, cells: Mapping[str, Scores], title: str) -> str:
    """Writes path.md, path.csv and path.png.

    Args:
        path: without a suffix.
        cells: the scores of all cells.
        title: title of the table, with the suite and the model.

    Returns:
        The table in Markdown.
    """
    rows = _corruption_rows(cells) if suite == "imagenet-c" else _accuracy_rows(cells)
    published = PUBLISHED.get(suite, {})
    values = ", ".join(f"{model} {value}" for model, value in published.items())
    measure = "mCE" if suite == "imagenet-c" else "top-1 accuracy"
    num_images, num_published = sum(int(scores["images"]) for scores in cells.values()), IMAGES[suite] * len(cells)
    of_all = f" of the {num_published:,} published" if num_images != num_published else ""
    lines = [f"{title}: {num_images:,} images{of_all}", "", tables.markdown(rows[0], rows[1:])]
    lines += ["", f"Published {measure} of the paper's models: {values}."] if published else []
    table = "\n".join(lines) + "\n"
    figure = _draw_corruptions(cells) if suite == "imagenet-c" else _draw_accuracies(cells, published)
    figure.suptitle(title, fontsize=10)
    atomic.write_text(path.with_suffix(".md"), table)
    tables.write_csv(path.with_suffix(".csv"), rows)
    tables.save(figure, path.with_suffix(".png"))
    return table


def _accuracy_rows(cells: Mapping[str, Scores]) -> list[list[str]]:
    measures = [measure for measure in MEASURES if any(measure in scores for scores in cells.values())]
    rows = [
        [name, str(scores["images"]), *(f"{scores[m]:.3f}" if m in scores else "" for m in measures)]
        for name, scores in cells.items()
    ]
    return [["", "images", *(MEASURES[measure] for measure in measures)], *rows]


def _corruption_rows(cells: Mapping[str, Scores]) -> list[list[str]]:
    """Errors at each severity, their mean, the mean of AlexNet, and the ratio of the two in percent.

    If the classes are imbalanced, another column has the mean of 100 minus the balanced accuracy.
    """
    errors = {name: 100 - scores["acc1"] for name, scores in cells.items()}
    summary = corruption_errors(errors)
    rows = [["error, %", *map(str, SEVERITIES), "mean", "AlexNet", "normalized"]]
    for name, alexnet in CORRUPTIONS.items():
        five = [errors[f"{name}/{severity}"] for severity in SEVERITIES]
        numbers = [*five, summary.mean[name], 100 * alexnet, summary.normalized[name]]
        rows.append([name, *(f"{number:.1f}" for number in numbers)])
    of_all = [sum(errors[f"{name}/{severity}"] for name in CORRUPTIONS) / len(CORRUPTIONS) for severity in SEVERITIES]
    alexnet = 100 * sum(CORRUPTIONS.values()) / len(CORRUPTIONS)
    ends = [f"{summary.unnormalized:.1f}", f"{alexnet:.1f}", f"**mCE {summary.mce:.1f}**"]
    rows.append(["mean", *(f"{error:.1f}" for error in of_all), *ends])
    balanced = np.array(
        [[100 - cells[f"{name}/{level}"].get("balanced_acc", np.nan) for level in SEVERITIES] for name in CORRUPTIONS]
    )
    if not np.isnan(balanced).all():
        means = ["" if np.isnan(mean) else f"{mean:.1f}" for mean in (*balanced.mean(axis=1), balanced.mean())]
        rows = [[*row, text] for row, text in zip(rows, ["balanced mean", *means], strict=True)]
    return rows


def _draw_corruptions(cells: Mapping[str, Scores]) -> Any:
    figure = tables.new_figure(11, 3.6)
    panels = figure.subplots(1, len(ALEXNET), sharey=True)
    for axes, (family, corruptions) in zip(panels, ALEXNET.items(), strict=True):
        for name in corruptions:
            errors = [100 - cells[f"{name}/{severity}"]["acc1"] for severity in SEVERITIES]
            axes.plot(SEVERITIES, errors, marker=".", label=name)
        axes.set(title=family, xlabel="severity", xticks=list(SEVERITIES), ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("error, %")
    return figure


def _draw_accuracies(cells: Mapping[str, Scores], published: Mapping[str, float]) -> Any:
    """Draws a bar for each cell, and the published accuracies below."""
    bars = [(name, scores["acc1"], "C0") for name, scores in cells.items()]
    bars += [(f"{model}, published", accuracy, "0.7") for model, accuracy in published.items()]
    figure = tables.new_figure(7, 1.2 + 0.4 * len(bars))
    axes = figure.subplots()
    container = axes.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color=[c for _, _, c in bars])
    axes.bar_label(container, fmt="%.1f", padding=3)
    axes.set(xlabel="top-1 accuracy, %", xlim=(0, 100))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure

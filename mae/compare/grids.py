"""The choice of hyperparameters by the scores of held-out training images. A grid that ends at its best is extended."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mae.evaluate.tasks import best_of

logger = logging.getLogger(__name__)

MOST_EXTENSIONS = 8  # of a grid, each by about a factor of 3

Scores = Mapping[Any, float]  # by value


def choose(
    options: Sequence[str], values: Sequence[Any], scores_of: Callable[[str, Sequence[Any]], Scores],
    lower_is_better: bool = False, least: float = 0, most: float = math.inf,
) -> tuple[str, Any]:  # fmt: skip
    """Returns the option and the value with the best score.

    While the best value of an option is at an end of the grid, and no other is as good, the next value beyond this end
    is tried for all options. A grid of one value is not extended. Of several best values, an inner one is preferred; of
    several best options, the first.

    Args:
        values: the grid.
        scores_of: computes the scores of an option for some values.
        least, most: limits of the values.
    """
    found: dict[str, dict[Any, float]] = {option: {} for option in options}
    new = sorted(values)
    for extension in range(MOST_EXTENSIONS + 1):
        for option, scores in found.items():
            scores.update(scores_of(option, new))
        best = {option: _best(scores, lower_is_better) for option, scores in found.items()}
        grid = sorted(found[options[0]])
        beyond = {_beyond(grid, value, least, most) for value in best.values()}
        if not (new := sorted(beyond - {None})):
            break
        if extension == MOST_EXTENSIONS:
            logger.warning(f"the best of {len(grid)} values, {grid[0]:g} to {grid[-1]:g}, is still at an end")
    chosen = options[best_of([found[option][best[option]] for option in options], lower_is_better)]
    return chosen, best[chosen]


def _best(scores: Scores, lower_is_better: bool) -> Any:
    """Returns the value with the best score; of several, an inner one."""
    first, *inner = sorted(scores)
    ordered = [*inner[:-1], first, *inner[-1:]]
    return ordered[best_of([scores[value] for value in ordered], lower_is_better)]


def _beyond(grid: Sequence[Any], best: Any, least: float, most: float) -> Any:
    """Returns the next value beyond the end of a grid, of the type of its values; None if `best` is inner."""
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    is_largest = best == grid[-1]
    value = float(f"{best * 3.4 if is_largest else best / 3:.1g}")  # 1, 3, 10, 30
    value = min(max(round(value) if isinstance(best, int) else value, least), most)
    return None if value in grid else type(best)(value)

"""What a learning curve is drawn against: steps, epochs or training seconds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from normlab.report.row import Row, Sweep

if TYPE_CHECKING:
    import numpy as np

AXES = {"steps": "steps", "epochs": "epochs", "seconds": "training seconds"}
"""Each horizontal axis and its label; the first is every run's."""


def is_on(row: Row, axis: str) -> bool:
    """True if a run has a curve and says where its points stand on an axis."""
    said = {"steps": True, "epochs": row.steps_per_epoch, "seconds": row.seconds}
    return bool(row.curve and said[axis])


def axes_of(sweep: Sweep) -> list[str]:
    """Returns the axes that at least one run's curve can be drawn against."""
    return [axis for axis in AXES if any(is_on(row, axis) for row in sweep.rows)]


def left_out(sweep: Sweep, axis: str) -> int:
    """Returns how many of the runs that have a curve have no place on an axis."""
    return sum(bool(row.curve) and not is_on(row, axis) for row in sweep.runs())


class Aligned(NamedTuple):
    """The curves of some runs over one scale; S is the number of steps in any of them."""

    scale: "np.ndarray"  # [S] where each step stands on the axis
    values: "np.ndarray"  # [runs, S] test accuracy in percent, NaN where a run has no point


def aligned(rows: Sequence[Row], axis: str) -> Aligned:
    """Returns the curves of `rows`, all of them on the axis, over their common scale.

    The scale is the mean over the seeds of where they say that a step stands. Where a seed has
    ended, the others' way from step to step is added, so that the scale never turns back; between
    its points a seed is interpolated.
    """
    import numpy as np

    own = [np.array([step for step, _ in row.curve], dtype=np.float64) for row in rows]
    steps = np.unique(np.concatenate(own))
    values, places = np.full((2, len(rows), steps.size), np.nan)
    for line, place, row, taken in zip(values, places, rows, own, strict=True):
        found = np.searchsorted(steps, taken)
        line[found] = [100 * accuracy for _, accuracy in row.curve]
        reached = slice(found[-1] + 1)
        start = np.zeros(1)
        place[reached] = np.interp(
            steps[reached],
            np.concatenate([start, taken]),
            np.concatenate([start, _places(row, taken, axis)]),
        )
    scale = np.cumsum(np.nanmean(np.diff(places, axis=1, prepend=0), axis=0))
    return Aligned(scale, values)


def _places(row: Row, steps: "np.ndarray", axis: str) -> "np.ndarray":
    """Returns where a run says that the steps of its curve stand on an axis it is on."""
    import numpy as np

    if axis == "seconds":
        return np.array(row.seconds)
    return steps / (row.steps_per_epoch or 1) if axis == "epochs" else steps

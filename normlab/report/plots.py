"""What the figures show: learning curves, error against a swept field, one unit over training.

Each is a list of panels; `canvas` makes elements of the page or files of them.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from normlab.report.axis import AXES, Aligned, aligned, axes_of, is_on
from normlab.report.canvas import Panel, style
from normlab.report.files import as_number
from normlab.report.row import Row, Sweep, measured
from normlab.report.statistics import Interval, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = (10, 50, 75, 90, 95, 98, 99, 99.5, 99.8, 99.9)  # of the stretched scale, in percent
_LEAST_ERROR = 0.05  # percent; the stretched scale ends at 100 minus this, as log 0 has no place


class Line(NamedTuple):
    """One normalizer's curves in a panel."""

    place: int  # of the normalizer
    curves: Aligned
    states: list[str]  # of the runs


class Figures(NamedTuple):
    """All figures of a report, each drawn when it is asked for."""

    curves: dict[str, dict[str, Panel]]  # axis -> setting -> panel
    swept: dict[tuple[str, str], Panel]  # (field, the other swept fields) -> panel
    percentiles: dict[tuple[str, str], Panel]  # (setting, normalizer) -> panel

    def panels(self) -> list[Panel]:
        """Returns all of them, in the order of the page."""
        return [
            *(panel for panels in self.curves.values() for panel in panels.values()),
            *self.swept.values(),
            *self.percentiles.values(),
        ]


def figures(sweep: Sweep) -> Figures:
    """Returns what there is to draw of a sweep."""
    return Figures(
        {axis: curves(sweep, axis) for axis in axes_of(sweep)}, swept(sweep), percentiles(sweep)
    )


def curves(sweep: Sweep, axis: str = "steps") -> dict[str, Panel]:
    """Returns {setting: panel} with one line per normalizer, against one of AXES.

    Runs that have no place on the axis are left out, and settings without curves.
    """
    # All runs' values, so that the figures of all axes have one vertical scale.
    values = [100 * accuracy for row in sweep.rows for _, accuracy in row.curve]
    suffix = "" if axis == "steps" else f"-{axis}"
    panels: dict[str, Panel] = {}
    for setting in sweep.settings:
        lines = {}
        for index, norm in enumerate(sweep.norms):
            rows = [row for row in sweep.cell(setting, norm) if is_on(row, axis)]
            if rows:
                lines[norm] = Line(index, aligned(rows, axis), [row.state for row in rows])
        if lines:
            panels[setting] = Panel(
                name=f"curves-{len(panels)}{suffix}",
                title=f"Test accuracy against {AXES[axis]}: {setting}",
                draw=partial(
                    _draw_curves,
                    lines=lines.values(),
                    axis=axis,
                    limits=(min(values), max(values)),
                ),
                legend={norm: style(line.place) for norm, line in lines.items()},
            )
    return panels


def percentiles(sweep: Sweep) -> dict[tuple[str, str], Panel]:
    """Returns {(setting, normalizer): panel} of the probe's percentiles, of the first seed."""
    first = {}
    for setting in sweep.settings:
        for norm in sweep.norms:
            rows = [row for row in sweep.cell(setting, norm) if row.probe]
            if rows:
                first[setting, norm] = rows[0]
    values = [value for row in first.values() for curve in row.probe.values() for _, value in curve]
    panels = {}
    for index, ((setting, norm), row) in enumerate(first.items()):
        line = {"color": style(sweep.norms.index(norm))["color"], "linewidth": 1.4}
        safe = re.sub("[^a-z0-9_]", "", norm)[:40]
        panels[setting, norm] = Panel(
            name=f"unit-{safe}-{index}" if safe else f"unit-{index}",
            title=f"Percentiles of one unit's input: {norm} in {setting}",
            draw=partial(_draw_percentiles, row=row, line=line, values=values),
            legend={norm: line},
        )
    return panels


def _draw_percentiles(axes: "Axes", row: Row, line: dict, values: list[float]) -> None:
    for curve in row.probe.values():
        steps, measured = zip(*curve, strict=True)
        axes.plot(steps, measured, **line)
    margin = 0.04 * max(max(values) - min(values), 1e-9)
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_ylabel("input of the activation")
    _horizontal(axes, "steps")


def swept(sweep: Sweep) -> dict[tuple[str, str], Panel]:
    """Returns {(field, the other swept fields): panel}: test error against a swept field's values.

    One line per normalizer with the interval over seeds; fields with one number are left out.
    """
    panels: dict[tuple[str, str], dict[str, dict[float, list[Row]]]] = {}
    for setting in sweep.settings:
        for norm in sweep.norms:
            for row in sweep.cell(setting, norm):
                for field, value in row.labels.items():
                    x = as_number(value)
                    if x is not None:
                        panel = panels.setdefault((field, _others(row, field)), {})
                        panel.setdefault(norm, {}).setdefault(x, []).append(row)
    drawn = {
        place: panel for place, panel in panels.items() if len(set().union(*panel.values())) > 1
    }
    return {
        (field, others): Panel(
            name=f"swept-{index}",
            title=f"Test error against {field}" + (f", {others}" if others else ""),
            draw=partial(_draw_swept, panel=panel, sweep=sweep),
            legend={norm: style(sweep.norms.index(norm)) for norm in panel},
            xlabel=field,
        )
        for index, ((field, others), panel) in enumerate(drawn.items())
    }


def _others(row: Row, field: str) -> str:
    """Returns what else tells a run's setting from others: its names and other swept fields."""
    swept = {f"{name.rpartition('.')[2]}={value}" for name, value in row.labels.items()}
    names = [part for part in row.setting.split(", ") if part not in swept | {"base"}]
    return ", ".join([*names, *(f"{k}={v}" for k, v in row.labels.items() if k != field)])


def _draw_swept(axes: "Axes", panel: dict[str, dict[float, list[Row]]], sweep: Sweep) -> None:
    for norm, by_value in panel.items():
        points = []
        for x, rows in sorted(by_value.items()):
            errors = [100 - 100 * accuracy for accuracy in measured(rows, "test_accuracy")]
            found = summarize(errors, kind=sweep.interval)
            if found.mean is not None:
                ends = found.interval or Interval(found.mean, found.mean)
                points.append((x, found.mean, found.mean - ends.low, ends.high - found.mean))
        if points:
            xs, means, below, above = zip(*points, strict=True)
            look = style(sweep.norms.index(norm))
            axes.errorbar(xs, means, yerr=(below, above), capsize=3, elinewidth=1, **look)
    values = sorted(set().union(*panel.values()))
    if values[0] > 0 and values[-1] / values[0] >= 8:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("value")
    axes.set_ylabel("test error (%)")


def _draw_curves(
    axes: "Axes", lines: Iterable[Line], axis: str, limits: tuple[float, float]
) -> None:
    for line in lines:
        _draw_line(axes, line)
    _scale(axes, *limits)
    axes.set_ylabel("test accuracy (%)")
    _horizontal(axes, axis)


def _horizontal(axes: "Axes", axis: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(left=0)
    axes.set_xlabel(AXES[axis])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis == "steps"))
    if axis == "steps" or axes.get_xlim()[1] >= 1000:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _scale(axes: "Axes", low: float, high: float) -> None:
    """Sets the accuracy axis for values from `low` to `high` percent."""
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) < 4:
        margin = 0.04 * max(high - low, 1)
        axes.set_ylim(low - margin, high + margin)
        return
    import numpy as np

    def stretch(percent: np.ndarray) -> np.ndarray:
        return -np.log10(np.maximum(100 - percent, _LEAST_ERROR))

    def unstretch(position: np.ndarray) -> np.ndarray:
        return 100 - 10**-position

    axes.set_yscale("function", functions=(stretch, unstretch))
    ends = stretch(np.array([low, high]))
    margin = 0.04 * (ends[1] - ends[0])
    axes.set_ylim(*unstretch(ends + np.array([-margin, margin])))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _draw_line(axes: "Axes", line: Line) -> None:
    """Draws one normalizer: mean and band over the steps that all seeds have, then each seed."""
    import numpy as np

    look = style(line.place)
    scale, values = line.curves
    common = np.flatnonzero(~np.isnan(values).any(axis=0))
    if common.size:
        xs, columns = scale[common], values[:, common]
        stride = -(-common.size // 6)
        axes.plot(
            xs,
            columns.mean(axis=0),
            # Markers of different normalizers stand at different steps, or they would hide another.
            markevery=slice(line.place % stride, None, stride),
            zorder=3,
            **look,
        )
        band = columns.min(axis=0), columns.max(axis=0)
        axes.fill_between(xs, *band, color=look["color"], alpha=0.16, linewidth=0)
    end = common[-1] if common.size else 0
    for seed, state in zip(values, line.states, strict=True):
        rest = end + np.flatnonzero(~np.isnan(seed[end:]))
        if rest.size > 1:
            axes.plot(scale[rest], seed[rest], lw=0.8, color=look["color"])
        if state == "diverged":
            cross = {"ms": 7, "mew": 1.8, "color": look["color"], "zorder": 4}
            axes.plot(scale[rest[-1:]], seed[rest[-1:]], "x", **cross)

"""Learning curves as SVG that takes its colours from the page around it.

No name from a config is drawn inside a figure (names stand in the page's own text), and the user's
matplotlib settings are set aside, so equal runs give equal bytes.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from normlab.report.files import as_number
from normlab.report.row import Row, Sweep, measured
from normlab.report.statistics import summarize
from normlab.report.style import INK, LIGHT, LINE, MUTED, NUM_SERIES, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Test accuracy against optimizer steps. Line: mean over seeds; band: lowest to highest seed. "
    "Line and band end where the first seed ends; the seeds that go on are drawn thin. "
    "× ends a diverged seed. Panels share one vertical scale; reaching high accuracies, it is "
    "stretched towards 100%, so that equal distances are equal ratios of the error."
)

_TICKS = (10, 50, 75, 90, 95, 98, 99, 99.5, 99.8, 99.9)  # of the stretched scale, in percent
_LEAST_ERROR = 0.05  # percent; the stretched scale ends at 100 minus this, as log 0 has no place
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (7, 1.6, 1.4, 1.6)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<")

# Colours that stand for the page's: matplotlib writes them out, `_svg` puts variables in place.
_STAND_IN = {name: f"#0a0b{index:02x}" for index, name in enumerate((INK, MUTED, LINE))}
_STAND_IN |= {series(index): f"#0a0c{index:02x}" for index in range(NUM_SERIES)}


def curves(sweep: Sweep) -> dict[str, str]:
    """Returns {setting: SVG} with one line per normalizer; settings without curves are left out."""
    drawn = [setting for setting in sweep.settings if any(_curves_of(sweep, setting))]
    if not drawn:
        return {}
    values = [100 * accuracy for row in sweep.rows for _, accuracy in row.curve]
    limits = min(values), max(values)
    with _plain_matplotlib():
        return {
            setting: _svg(_panel(sweep, setting, limits), f"curve{index}")
            for index, setting in enumerate(drawn)
        }


def percentiles(sweep: Sweep) -> dict[tuple[str, str], str]:
    """Returns {(setting, normalizer): SVG} of the probe's percentiles, of the first seed."""
    first = {}
    for setting in sweep.settings:
        for norm in sweep.norms:
            rows = [row for row in sweep.cell(setting, norm) if row.probe]
            if rows:
                first[setting, norm] = rows[0]
    values = [value for row in first.values() for curve in row.probe.values() for _, value in curve]
    with _plain_matplotlib():
        return {
            cell: _svg(_percentile_panel(row, sweep.norms.index(cell[1]), values), f"probe{index}")
            for index, (cell, row) in enumerate(first.items())
        }


def _percentile_panel(row: Row, index: int, values: list[float]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.7, 3.2))
    axes = figure.add_axes((0.15, 0.145, 0.83, 0.835))
    for curve in row.probe.values():
        steps, measured = zip(*curve, strict=True)
        axes.plot(steps, measured, color=_style(index)["color"], linewidth=1.4)
    margin = 0.04 * max(max(values) - min(values), 1e-9)
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_ylabel("input of the activation")
    _steps_axis(axes)
    return figure


def swept(sweep: Sweep) -> dict[tuple[str, str], str]:
    """Returns {(field, the other swept fields): SVG}: test error against a swept field's values.

    One line per normalizer with the t interval over seeds; fields with one number are left out.
    """
    panels: dict[tuple[str, str], dict[str, dict[float, list[Row]]]] = {}
    for setting in sweep.settings:
        for norm in sweep.norms:
            for row in sweep.cell(setting, norm):
                for field, value in row.labels.items():
                    x = as_number(value)
                    if x is not None:
                        others = (f"{k}={v}" for k, v in row.labels.items() if k != field)
                        panel = panels.setdefault((field, ", ".join(others)), {})
                        panel.setdefault(norm, {}).setdefault(x, []).append(row)
    drawn = {key: panel for key, panel in panels.items() if len(set().union(*panel.values())) > 1}
    with _plain_matplotlib():
        return {
            key: _svg(_swept_panel(panel, sweep.norms), f"swept{index}")
            for index, (key, panel) in enumerate(drawn.items())
        }


def _swept_panel(panel: dict[str, dict[float, list[Row]]], norms: tuple[str, ...]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.7, 3.2))
    axes = figure.add_axes((0.125, 0.145, 0.855, 0.835))
    for norm, by_value in panel.items():
        points = []
        for x, rows in sorted(by_value.items()):
            errors = [100 - 100 * accuracy for accuracy in measured(rows, "test_accuracy")]
            found = summarize(errors)
            if found.mean is not None:
                points.append((x, found.mean, found.half_width or 0.0))
        if points:
            xs, means, half_widths = zip(*points, strict=True)
            style = _style(norms.index(norm))
            axes.errorbar(xs, means, yerr=half_widths, capsize=3, elinewidth=1, **style)
    values = sorted(set().union(*panel.values()))
    if values[0] > 0 and values[-1] / values[0] >= 8:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("value")
    axes.set_ylabel("test error (%)")
    return figure


def keys(sweep: Sweep) -> dict[str, str]:
    """Returns {normalizer: SVG of its line}, the legend of `curves`."""
    from matplotlib.figure import Figure

    found = {}
    with _plain_matplotlib():
        for index, norm in enumerate(sweep.norms):
            figure = Figure(figsize=(0.5, 0.2))
            axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(0, 2))
            axes.set_axis_off()
            axes.plot((0.1, 1, 1.9), (1, 1, 1), markevery=[1], **_style(index))
            found[norm] = _svg(figure, f"key{index}")
    return found


def standalone(svg: str) -> str:
    """Returns a figure as a file of its own, in the colours of the light page."""
    text = re.sub(r"var\(--([\w-]+)\)", lambda match: LIGHT[match[1]], svg)
    head, rest = text.replace(' aria-hidden="true"', "", 1).split(">", 1)
    ground = f'<rect width="100%" height="100%" fill="{LIGHT["card"]}"/>'
    font = "<style>text{font-family:sans-serif}</style>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{font}{ground}{rest}\n'


def _curves_of(sweep: Sweep, setting: str) -> Iterator[Row]:
    cells = (sweep.cell(setting, norm) for norm in sweep.norms)
    return (row for rows in cells for row in rows if row.curve)


def _panel(sweep: Sweep, setting: str, limits: tuple[float, float]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.7, 3.2))
    axes = figure.add_axes((0.125, 0.145, 0.855, 0.835))
    for index, norm in enumerate(sweep.norms):
        _draw(axes, [row for row in _curves_of(sweep, setting) if row.norm == norm], index)
    _scale(axes, *limits)
    axes.set_ylabel("test accuracy (%)")
    _steps_axis(axes)
    return figure


def _steps_axis(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(left=0)
    axes.set_xlabel("steps")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
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


def _draw(axes: "Axes", rows: list[Row], index: int) -> None:
    """Draws one normalizer: mean and band over the steps that all seeds have, then each seed."""
    if not rows:
        return
    style = _style(index)
    seeds = [dict(row.curve) for row in rows]
    common = sorted(set.intersection(*(set(seed) for seed in seeds)))
    if common:
        columns = [[100 * seed[step] for seed in seeds] for step in common]
        stride = -(-len(common) // 6)
        axes.plot(
            common,
            [sum(column) / len(column) for column in columns],
            # Markers of different normalizers stand at different steps, or they would hide another.
            markevery=slice(index % stride, None, stride),
            zorder=3,
            **style,
        )
        band = ([min(column) for column in columns], [max(column) for column in columns])
        axes.fill_between(common, *band, color=style["color"], alpha=0.16, linewidth=0)
    end = common[-1] if common else 0
    for row, seed in zip(rows, seeds, strict=True):
        rest = [step for step in sorted(seed) if step >= end]
        if len(rest) > 1:
            axes.plot(rest, [100 * seed[step] for step in rest], lw=0.8, color=style["color"])
        if row.state == "diverged":
            axes.plot(
                rest[-1:],
                [100 * seed[rest[-1]]],
                "x",
                ms=7,
                mew=1.8,
                color=style["color"],
                zorder=4,
            )


def _style(index: int) -> dict:
    """Returns colour, dashes and marker of the normalizer in place `index`: all three differ."""
    return {
        "color": _STAND_IN[series(index)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.2,
        "linewidth": 1.6,
    }


@contextmanager
def _plain_matplotlib() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "normlab",
                "font.size": 10,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "text.color": _STAND_IN[INK],
                "axes.labelcolor": _STAND_IN[MUTED],
                "axes.edgecolor": _STAND_IN[LINE],
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": _STAND_IN[LINE],
                "grid.linewidth": 0.6,
                "xtick.color": _STAND_IN[LINE],
                "ytick.color": _STAND_IN[LINE],
                "xtick.labelcolor": _STAND_IN[MUTED],
                "ytick.labelcolor": _STAND_IN[MUTED],
            }
        )
        yield


def _svg(figure: "Figure", prefix: str) -> str:
    """Returns the figure as an element to put into a page; `prefix` keeps its ids apart."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :].rstrip()
    # The file's own style sheet would speak to the whole page; the page has the same rule.
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', ' aria-hidden="true"', text, count=1)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for name, colour in _STAND_IN.items():
        text = text.replace(colour, f"var(--{name})")
    return text

"""Figures as text and bytes: SVG in the colours of the page around it; SVG and PDF files.

In the page no name from a config is drawn inside a figure: names stand in the page's own text. A
file has a legend, and matplotlib takes every name in it as literal text. The user's matplotlib
settings are set aside and nothing carries a date, so equal runs give equal bytes.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normlab.report.style import INK, LIGHT, LINE, MUTED, NUM_SERIES, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.7, 3.2  # inches, without legend
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.68, 0.09, 0.46, 0.07  # inches around the axes
_LEGEND_LINE = 0.19  # inches
_LONGEST = 44  # characters of a name in a figure

_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (7, 1.6, 1.4, 1.6)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<")

# Colours that stand for the page's: matplotlib writes them out, `_element` puts variables in place.
_STAND_IN = {name: f"#0a0b{index:02x}" for index, name in enumerate((INK, MUTED, LINE))}
_STAND_IN |= {series(index): f"#0a0c{index:02x}" for index in range(NUM_SERIES)}
_STAND_IN["card"] = "none"


@dataclass(frozen=True)
class Panel:
    """One figure: what to draw, and what to call it."""

    name: str  # of its files: indices and safe characters, nothing else from a config
    title: str  # what it shows, as plain text
    draw: Callable[["Axes"], None]
    legend: Mapping[str, Mapping[str, Any]]  # normalizer -> style of its line
    xlabel: str = ""  # from a config, so for a file only


def style(index: int) -> dict[str, Any]:
    """Returns colour, dashes and marker of the normalizer in place `index`: all three differ."""
    return {
        "color": f"C{index % NUM_SERIES}",
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.2,
        "linewidth": 1.6,
    }


def elements(panels: Iterable[Panel]) -> Iterator[str]:
    """Yields each panel as an SVG element to put into the page."""
    with _plain_matplotlib(_STAND_IN):
        for panel in panels:
            yield _element(_figure(panel, 0), panel.name)


def key(index: int) -> str:
    """Returns the line of the normalizer in place `index` as an SVG element, for a legend."""
    from matplotlib.figure import Figure

    with _plain_matplotlib(_STAND_IN):
        figure = Figure(figsize=(0.5, 0.2))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(0, 2))
        axes.set_axis_off()
        axes.plot((0.1, 1, 1.9), (1, 1, 1), markevery=[1], **style(index))
        return _element(figure, f"key{index}")


def files(panels: Iterable[Panel]) -> Iterator[tuple[bytes, bytes]]:
    """Yields each panel as (SVG file, PDF file), in the light page's colours, with a legend."""
    # A letter that the font lacks is a box in a PDF, and no message on the terminal.
    with _plain_matplotlib(LIGHT), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for panel in panels:
            figure = _with_legend(panel)
            yield _svg(figure, {"Title": panel.title}).encode(), _pdf(figure, panel.title)


def _figure(panel: Panel, below: float) -> "Figure":
    """Returns the panel drawn, with `below` inches left under it."""
    from matplotlib.figure import Figure

    height = _HEIGHT + below
    figure = Figure(figsize=(_WIDTH, height))
    place = (
        _LEFT / _WIDTH,
        (_BOTTOM + below) / height,
        (_WIDTH - _LEFT - _RIGHT) / _WIDTH,
        (_HEIGHT - _BOTTOM - _TOP) / height,
    )
    panel.draw(figure.add_axes(place))
    return figure


def _with_legend(panel: Panel) -> "Figure":
    from matplotlib.lines import Line2D

    names = [_shortened(norm) for norm in panel.legend]
    widest = max(map(len, names), default=0)
    columns = max(1, min(len(names), int(_WIDTH / (0.65 + 0.075 * widest))))
    lines = -(-len(names) // columns)
    figure = _figure(panel, 0.1 + _LEGEND_LINE * lines)
    if panel.xlabel:
        figure.axes[0].set_xlabel(_shortened(panel.xlabel))
    handles = [Line2D([], [], **style) for style in panel.legend.values()]
    # Put in afterwards: as a label, a name that starts with an underscore would be left out.
    legend = figure.legend(
        handles,
        ["-"] * len(names),
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelspacing=0.3,
        handlelength=2.6,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


@contextmanager
def _plain_matplotlib(colours: Mapping[str, str]) -> Iterator[None]:
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "normlab",
                "pdf.fonttype": 42,
                "text.parse_math": False,
                "font.size": 10,
                "figure.facecolor": colours["card"],
                "axes.facecolor": "none",
                "axes.prop_cycle": cycler(color=[colours[series(i)] for i in range(NUM_SERIES)]),
                "text.color": colours[INK],
                "axes.labelcolor": colours[MUTED],
                "axes.edgecolor": colours[LINE],
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": colours[LINE],
                "grid.linewidth": 0.6,
                "xtick.color": colours[LINE],
                "ytick.color": colours[LINE],
                "xtick.labelcolor": colours[MUTED],
                "ytick.labelcolor": colours[MUTED],
            }
        )
        yield


def _svg(figure: "Figure", metadata: Mapping[str, str]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(stream, metadata={**nothing, **metadata})
    return stream.getvalue()


def _pdf(figure: "Figure", title: str) -> bytes:
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    stream = io.BytesIO()
    nothing = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    FigureCanvasPdf(figure).print_pdf(stream, metadata=nothing | {"Title": title})
    return stream.getvalue()


def _element(figure: "Figure", prefix: str) -> str:
    """Returns the figure as an element to put into a page; `prefix` keeps its ids apart."""
    text = _svg(figure, {})
    text = text[text.index("<svg") :].rstrip()
    # The file's own style sheet would speak to the whole page; the page has the same rule.
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', ' aria-hidden="true"', text, count=1)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for name, colour in _STAND_IN.items():
        if colour.startswith("#"):
            text = text.replace(colour, f"var(--{name})")
    return text

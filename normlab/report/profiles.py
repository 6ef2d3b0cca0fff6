"""What a probe found by depth: as a table, as JSON and CSV, and as a figure.

Equal findings give equal bytes: no date, no path of a machine. What is not finite stands there as
the word inf or nan, so that a network that exploded does not look like one not measured.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab.report import canvas
from normlab.report.canvas import Panel, style
from normlab.report.tables import NOTHING, Cell, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SPREAD_OF_LOG_SCALE = 50.0  # of the highest line, largest over smallest value, from which on


@dataclass(frozen=True)
class Profile:
    """Numbers of each place of a network, from the input on, for each seed."""

    probe: str  # its name, which the files bear
    title: str
    subject: Mapping[str, Any]  # what was probed, and how
    places: tuple[str, ...]  # blocks or layers
    seeds: tuple[int, ...]
    values: Mapping[str, Sequence[Sequence[float | None]]]  # column -> seed -> place
    predicted: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # by place
    drawn: tuple[str, ...] = ()  # columns of the figure
    xlabel: str = ""
    ylabel: str = ""
    summary: Mapping[str, float | str | None] = field(default_factory=dict)  # of the whole

    def mean(self, column: str) -> list[float | None]:
        """Returns a column's mean over seeds at each place; None where no seed has a number.

        It is inf or nan where a seed's number is not finite.
        """
        return [_mean(values) for values in zip(*self.values[column], strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    total = math.fsum(known) if all(map(math.isfinite, known)) else sum(known)
    return total / len(known)


def first_not_finite(places: Sequence[str], rows: Sequence[Sequence[float | None]]) -> str | None:
    """Returns the first place at which a number of any seed (`rows`) is not finite; None: none."""
    for place, values in zip(places, zip(*rows, strict=True), strict=True):
        if not all(value is None or math.isfinite(value) for value in values):
            return place
    return None


def table(profile: Profile) -> Table:
    """Returns a row a place: means over seeds, with a prediction beside its column."""
    columns = {}
    for name in profile.values:
        columns[name] = profile.mean(name)
        if name in profile.predicted:
            columns[f"predicted {name}"] = list(profile.predicted[name])
    rows = zip(profile.places, *columns.values(), strict=True)
    return Table(
        columns=("place", *(name.replace("_", " ") for name in columns)),
        rows=tuple((Cell(place), *map(_cell, numbers)) for place, *numbers in rows),
    )


def _cell(value: float | None) -> Cell:
    return Cell(NOTHING if value is None else f"{value:.4g}")


def json_text(profile: Profile) -> str:
    """Returns all that was found, with every seed's numbers; what is not finite is a string."""
    found = {
        "probe": profile.probe,
        "subject": dict(profile.subject),
        "summary": {name: _clean(value) for name, value in profile.summary.items()},
        "places": list(profile.places),
        "seeds": list(profile.seeds),
        "values": {
            name: [[_clean(value) for value in seed] for seed in seeds]
            for name, seeds in profile.values.items()
        },
        "predicted": {
            name: [_clean(value) for value in values] for name, values in profile.predicted.items()
        },
    }
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def csv_text(profile: Profile) -> str:
    """Returns a line a seed and place, in full precision; what there is no number for is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    predicted = [f"predicted_{name}" for name in profile.predicted]
    writer.writerow(["seed", "place", *profile.values, *predicted])
    for i, seed in enumerate(profile.seeds):
        for j, place in enumerate(profile.places):
            numbers = [seeds[i][j] for seeds in profile.values.values()]
            numbers += [values[j] for values in profile.predicted.values()]
            writer.writerow([seed, place, *numbers])
    return stream.getvalue()


def _clean(value: Any) -> Any:
    """Returns the value, or the word inf, -inf or nan, for which JSON has no number."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def panel(profile: Profile) -> Panel:
    """Returns the figure: a line a column against depth, predictions as dots without a line."""
    looks: dict[str, dict[str, Any]] = {}
    lines = []
    for index, name in enumerate(profile.drawn):
        label, look = name.replace("_", " "), style(index)
        looks[label] = look
        lines.append((profile.mean(name), look))
        if name in profile.predicted:
            dots = look | {"linestyle": "none", "marker": "x", "markersize": 6.5}
            looks[f"predicted {label}"] = dots
            lines.append((list(profile.predicted[name]), dots))
    return Panel(
        name=profile.probe,
        title=profile.title,
        draw=partial(_draw, lines=lines, xlabel=profile.xlabel, ylabel=profile.ylabel),
        legend=looks,
    )


def _draw(
    axes: "Axes",
    lines: Sequence[tuple[list[float | None], dict[str, Any]]],
    xlabel: str,
    ylabel: str,
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for values, look in lines:
        points = [(i, v) for i, v in enumerate(values, 1) if v is not None and math.isfinite(v)]
        if points:
            axes.plot(*zip(*points, strict=True), **look)
    positive = [[v for v in values if v is not None and 0 < v < math.inf] for values, _ in lines]
    # The highest line decides: what is near zero beside it may well lie on the axis.
    highest = max(filter(None, positive), key=max, default=[1.0])
    if max(highest) / min(highest) >= _SPREAD_OF_LOG_SCALE:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(value: float) -> str:
    """Returns a power of ten; matplotlib's own would be mathematical text, which is off."""
    return f"10{str(round(math.log10(value))).translate(_SUPERSCRIPTS)}"


def write(profile: Profile, folder: Path) -> list[Path]:
    """Writes NAME.json, .csv, .svg and .pdf into a folder, and returns the paths."""
    from normlab.run import write_bytes

    [(svg, pdf)] = canvas.files([panel(profile)])
    contents = {
        "json": json_text(profile).encode(),
        "csv": csv_text(profile).encode(),
        "svg": svg,
        "pdf": pdf,
    }
    paths = []
    for suffix, content in contents.items():
        paths.append(folder / f"{profile.probe}.{suffix}")
        write_bytes(paths[-1], content)
    return paths

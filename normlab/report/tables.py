"""Rows to tables: what stands in each cell. `drawing`, `document` and `page` show them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from normlab.report.quantity import Quantity
from normlab.report.row import STATES, Row, Sweep, measured
from normlab.report.statistics import Summary, summarize

DAGGER = "†"
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A table's cell; `str(cell)` is all of it on one line."""

    text: str = NOTHING
    spread: str = ""  # the interval: `± 1.23` or `[98.10, 99.45]`
    detail: str = ""  # n, and the dagger of a shared run
    marks: tuple[str, ...] = ()  # what a reader must not miss: "1/3 diverged"
    strong: bool = False  # the statistics say so
    link: str = ""  # relative address
    state: str = ""  # one of STATES, for the page's colours

    def __str__(self) -> str:
        value = f"{self.text} {self.spread}" if self.spread else self.text
        marks = f"({', '.join(self.marks)})" if self.marks else ""
        return " ".join(filter(None, (value, self.detail, marks)))


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; the first `num_names` columns name the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_names: int = 1
    words: frozenset[int] = frozenset({0})  # places of the columns of words; the rest are numbers


def headline(sweep: Sweep) -> Table:
    """Returns normalizers × settings: mean test accuracy with its interval in percent, and n."""
    return Table(
        columns=("normalizer", *sweep.settings),
        rows=tuple(
            (
                Cell(norm),
                *(
                    accuracy_cell(sweep.cell(setting, norm), sweep.interval)
                    for setting in sweep.settings
                ),
            )
            for norm in sweep.norms
        ),
    )


def accuracy_cell(rows: Sequence[Row], interval: str, metric: str = "test_accuracy") -> Cell:
    """Returns the mean of the runs that ended with a measurement, its interval, what is missing.

    Runs that are done or diverged count if they have a final accuracy. Whatever else was planned
    is marked with its state, so a cell never looks more complete than it is.
    """
    if not rows:
        return Cell()
    summary = _summary(rows, metric, interval)
    missing = {
        state: sum(row.state == state for row in rows) for state in STATES if state != "done"
    }
    missing["without result"] = sum(
        row.state == "done" and row.number(metric) is None for row in rows
    )
    missing = {what: count for what, count in missing.items() if count}
    dagger = DAGGER if all(row.shared_with for row in rows) else ""
    if summary.n == 0 and len(missing) == 1:
        [(what, count)] = missing.items()
        state = what if what in STATES else ""
        return Cell(f"{what} ({count}/{len(rows)})", detail=dagger, state=state)
    return Cell(
        *_percent(summary),
        detail=" ".join(filter(None, (f"n={summary.n}", dagger))),
        marks=tuple(f"{count}/{len(rows)} {what}" for what, count in missing.items()),
    )


def quantity_cell(quantity: Quantity, setting: str, norm: str, interval: str) -> Cell:
    """Returns the mean over seeds with its interval and n, to four significant digits."""
    summary = summarize(quantity.values.get((setting, norm), {}).values(), kind=interval)
    if summary.mean is None:
        return Cell()
    decimals = 3
    if summary.mean:
        decimals = min(max(3 - math.floor(math.log10(abs(summary.mean))), 0), 6)
    spread = "" if summary.interval is None else summary.interval.text(decimals)
    return Cell(f"{summary.mean:.{decimals}f}", spread, detail=f"n={summary.n}")


def quantity_table(quantity: Quantity, sweep: Sweep) -> Table:
    """Returns normalizers × settings of one quantity."""
    return Table(
        columns=("normalizer", *sweep.settings),
        rows=tuple(
            (
                Cell(norm),
                *(
                    quantity_cell(quantity, setting, norm, sweep.interval)
                    for setting in sweep.settings
                ),
            )
            for norm in sweep.norms
        ),
    )


def costs(sweep: Sweep) -> Table:
    """Returns, per setting and normalizer, the three evaluations and what the runs cost.

    Accuracies are means with intervals in percent over seeds; times are medians over runs.
    """
    rows = []
    for setting in sweep.settings:
        for norm in sweep.norms:
            runs = sweep.cell(setting, norm)
            if not runs:
                continue
            dagger = DAGGER if all(row.shared_with for row in runs) else ""
            rows.append(
                (
                    Cell(setting),
                    Cell(norm, detail=dagger),
                    *(
                        Cell(*_percent(_summary(runs, f"test_accuracy{way}", sweep.interval)))
                        for way in ("", "_batch_statistics", "_recomputed_statistics")
                    ),
                    _median(runs, "step_seconds", lambda seconds: significant(1000 * seconds)),
                    _median(runs, "compile_seconds", significant),
                    _median(runs, "seconds", significant),
                    _median(runs, "num_params", lambda count: f"{count:,.0f}"),
                    Cell(count_states(runs)),
                )
            )
    return Table(
        columns=(
            "setting",
            "normalizer",
            "running statistics (%)",
            "batch statistics (%)",
            "recomputed statistics (%)",
            "step (ms)",
            "compile (s)",
            "total (s)",
            "parameters",
            "runs",
        ),
        rows=tuple(rows),
        num_names=2,
        words=frozenset({0, 1, 9}),
    )


def run_list(sweep: Sweep, links: bool = True) -> Table:
    """Returns every planned run with its state, its result and, if asked for, its folder's link."""
    return Table(
        columns=(
            "setting",
            "normalizer",
            "seed",
            "run",
            "state",
            "accuracy (%)",
            "steps",
            "seconds",
            "remarks",
        ),
        rows=tuple(_run(row, sweep.directory if links else None) for row in sweep.rows),
        num_names=2,
        words=frozenset({0, 1, 3, 4, 8}),
    )


def _run(row: Row, directory: Path | None) -> tuple[Cell, ...]:
    accuracy = row.number("test_accuracy")
    seconds = row.number("seconds")
    steps = row.number("steps") or row.step
    remarks = [row.message, *row.notes]
    link = ""
    if directory is not None and row.state != "planned":
        link = f"{quote(row.path.relative_to(directory).as_posix())}/"
    return (
        Cell(row.setting),
        Cell(row.norm, detail=row.tuned),
        Cell(NOTHING if row.seed is None else str(row.seed)),
        Cell(
            row.id,
            detail=DAGGER if row.shared_with else "",
            link=link,
        ),
        Cell(row.state, state=row.state),
        Cell() if accuracy is None else Cell(f"{100 * accuracy:.2f}"),
        Cell() if steps is None else Cell(f"{steps:,.0f}"),
        Cell() if seconds is None else Cell(significant(seconds)),
        Cell("; ".join(filter(None, remarks))),
    )


def count_states(rows: Iterable[Row]) -> str:
    """Returns e.g. `2 done, 1 diverged`."""
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)


def _median(rows: Iterable[Row], metric: str, form: Callable[[float], str]) -> Cell:
    values = sorted(measured(rows, metric))
    if not values:
        return Cell()
    middle = len(values) // 2
    return Cell(form((values[middle] + values[~middle]) / 2))


def _summary(rows: Iterable[Row], metric: str, interval: str) -> Summary:
    """Returns the summary of a metric that is a fraction, in percent."""
    return summarize((100 * value for value in measured(rows, metric)), kind=interval)


def _percent(summary: Summary) -> tuple[str, str]:
    """Returns a cell's text and spread: two decimals, or one where the interval is wide."""
    if summary.mean is None:
        return NOTHING, ""
    if summary.interval is None:
        return f"{summary.mean:.2f}", ""
    decimals = 2 if summary.interval.half_width < 9.995 else 1
    return f"{summary.mean:.{decimals}f}", summary.interval.text(decimals)


def significant(value: float) -> str:
    """Returns a positive number with three significant digits, without an exponent."""
    decimals = next((d for d, limit in ((0, 99.95), (1, 9.995), (2, 0.9995)) if value >= limit), 3)
    return f"{value:,.{decimals}f}"

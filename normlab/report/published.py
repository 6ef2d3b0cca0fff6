"""The paper's numbers beside ours."""

from typing import Any

from normlab.report.claim import PublishedNumber, PublishedTable
from normlab.report.row import Row, Sweep
from normlab.report.tables import NOTHING, Cell, Table, accuracy_cell


def beside(sweep: Sweep, table: PublishedTable) -> Table:
    """Returns a row for each cell that the paper has a number for: theirs, ours, the difference.

    The difference is given only where the scale is the paper's own setting.
    """
    rows = []
    for setting in sweep.settings:
        for norm in sweep.norms:
            runs = sweep.cell(setting, norm)
            theirs = table.number(norm, _places(setting, runs))
            if theirs is not None:
                ours = accuracy_cell(runs, sweep.interval)
                rows.append((Cell(setting), Cell(norm), *_cells(theirs, ours, table)))
    return Table(
        columns=("setting", "normalizer", "paper (%)", "ours (%)", "ours − paper"),
        rows=tuple(rows),
        num_names=2,
        words=frozenset({0, 1}),
    )


def numbers(sweep: Sweep) -> list[dict[str, Any]]:
    """Returns every cell of the headline as JSON values, with the paper's number if it has one."""
    found = []
    for setting in sweep.settings:
        for norm in sweep.norms:
            runs = sweep.cell(setting, norm)
            if not runs:
                continue
            theirs = [
                (number.value, table.same_setting)
                for table in (sweep.claim.published if sweep.claim else ())
                if (number := table.number(norm, _places(setting, runs))) is not None
            ]
            paper, same_setting = theirs[0] if theirs else (None, False)
            ours = str(accuracy_cell(runs, sweep.interval))
            cell = {"setting": setting, "norm": norm, "ours": ours}
            found.append({**cell, "paper": paper, "same_setting": same_setting})
    return found


def _places(setting: str, runs: tuple[Row, ...]) -> tuple[str, ...]:
    """Returns under which names a paper's table may have this cell.

    Its setting; or, where one field alone is swept, that field's value.
    """
    values = {tuple(row.labels.values()) for row in runs}
    return (setting, *(value[0] for value in values if len(value) == 1))


def _cells(theirs: PublishedNumber, ours: Cell, table: PublishedTable) -> tuple[Cell, Cell, Cell]:
    detail = f"std {theirs.std:g}" if theirs.std is not None else ""
    if theirs.n is not None:
        detail = f"{detail} n={theirs.n}".strip()
    paper = Cell(f"{theirs.value:.2f}", detail=detail)
    try:
        mean = float(ours.text)
    except ValueError:
        return paper, ours, Cell()
    if not table.same_setting:
        return paper, ours, Cell(NOTHING)
    return paper, ours, Cell(f"{mean - theirs.value:+.2f}")

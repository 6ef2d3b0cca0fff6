"""The paper's numbers beside ours."""

from typing import Any

from normlab.report.claim import PublishedNumber, PublishedTable
from normlab.report.row import Row, Sweep
from normlab.report.tables import NOTHING, Cell, Table, accuracy_cell, quantity_cell


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
                ours = _ours(sweep, table, setting, norm)
                rows.append((Cell(setting), Cell(norm), *_cells(theirs, ours, table)))
    unit = "" if table.quantity else " (%)"
    return Table(
        columns=("setting", "normalizer", f"paper{unit}", f"ours{unit}", "ours − paper"),
        rows=tuple(rows),
        num_names=2,
        words=frozenset({0, 1}),
    )


def _ours(sweep: Sweep, table: PublishedTable, setting: str, norm: str) -> Cell:
    if table.quantity and sweep.claim is not None:
        measured = sweep.claim.quantity(table.quantity)
        return quantity_cell(measured, setting, norm, sweep.interval)
    return accuracy_cell(sweep.cell(setting, norm), sweep.interval)


def numbers(sweep: Sweep) -> list[dict[str, Any]]:
    """Returns every cell as JSON values, with the paper's number if it has one.

    The cells are those of the quantities that the claim is about, or else of the headline.
    """
    claim = sweep.claim
    names = [quantity.name for quantity in claim.quantities] if claim else []
    found = []
    for name in names or [""]:
        for setting in sweep.settings:
            for norm in sweep.norms:
                runs = sweep.cell(setting, norm)
                if claim and name:
                    ours = quantity_cell(claim.quantity(name), setting, norm, sweep.interval)
                else:
                    ours = accuracy_cell(runs, sweep.interval)
                if not runs or (name and ours == Cell()):
                    continue
                theirs = [
                    (number.value, table.same_setting)
                    for table in (claim.published if claim else ())
                    if table.quantity == name
                    if (number := table.number(norm, _places(setting, runs))) is not None
                ]
                paper, same_setting = theirs[0] if theirs else (None, False)
                cell = {"quantity": name, "setting": setting, "norm": norm, "ours": str(ours)}
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
    decimals = 4 if table.quantity else 2
    paper = Cell(f"{theirs.value:.{decimals}f}", detail=detail)
    try:
        mean = float(ours.text)
    except ValueError:
        return paper, ours, Cell()
    if not table.same_setting:
        return paper, ours, Cell(NOTHING)
    return paper, ours, Cell(f"{mean - theirs.value:+.{decimals}f}")

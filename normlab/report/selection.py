"""Each normalizer at its own best: values of a tuned field, chosen on the validation split."""

from collections.abc import Iterable, Mapping

from normlab.report.row import MEASURED, Choice, Row


def choose(rows: Iterable[Row]) -> Mapping[tuple[str, str], Choice]:
    """Returns {(setting, norm): choice} for the cells that have candidates.

    The highest mean validation accuracy over seeds wins; of equal ones the first. The test set has
    no part in it.
    """
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row.tuned:
            values = cells.setdefault((row.setting, row.norm), {}).setdefault(row.tuned, [])
            value = row.number("validation_accuracy")
            if row.state in MEASURED and value is not None:
                values.append(value)
    return {cell: _best(candidates) for cell, candidates in cells.items()}


def _best(candidates: Mapping[str, list[float]]) -> Choice:
    means = {
        name: sum(values) / len(values) if values else None for name, values in candidates.items()
    }
    measured = {name: mean for name, mean in means.items() if mean is not None}
    return Choice(max(measured or means, key=lambda name: measured.get(name, 0.0)), means)

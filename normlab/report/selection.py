"""Each normalizer at its own best: values of a tuned field, chosen on the validation split."""

from collections.abc import Iterable, Mapping

from normlab.report.row import MEASURED, Choice, Row


def choose(rows: Iterable[Row]) -> Mapping[tuple[str, str], Choice]:
    """Returns {(setting, norm): choice} for the cells that have candidates.

    The highest mean validation accuracy over seeds wins; of equal ones the first. A candidate of
    which seeds are missing is not chosen before one that has them. The test set has no part in it.
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
    counts = {name: len(values) for name, values in candidates.items()}
    whole = [name for name in candidates if counts[name] == max(counts.values())]
    return Choice(max(whole, key=lambda name: means[name] or 0.0), means, counts)

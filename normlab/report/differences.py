"""Each normalizer against the baseline, seed by seed, within each setting."""

from collections.abc import Callable, Sequence

from normlab.report.row import MEASURED, Row, Sweep
from normlab.report.statistics import Difference, paired_difference, seeds_needed
from normlab.report.tables import DAGGER, Cell, Table

NEEDED = ("data", "data order")  # hashes without which nothing shows that runs share a seed's draws

Pair = tuple[str, str, Sequence[Row], Sequence[Row]]  # setting, normalizer, its runs, baseline's

Measure = Callable[[Row], float | None]


def differences(sweep: Sweep) -> Table:
    """Returns, per setting, each normalizer's paired difference from the baseline in points.

    The intervals are of one family: Bonferroni over all of the table's rows.
    """
    compared = pairs(sweep)
    return Table(
        columns=("setting", "normalizer", "difference (points)", "seeds", "verdict"),
        rows=tuple(
            (Cell(setting), Cell(norm), *_cells(runs, base, len(compared), sweep.interval))
            for setting, norm, runs, base in compared
        ),
        num_names=2,
        words=frozenset({0, 1, 4}),
    )


def baseline_of(sweep: Sweep) -> str:
    """Returns the normalizer that the others are compared with: batch_norm, else the first."""
    return "batch_norm" if "batch_norm" in sweep.norms else sweep.norms[0]


def pairs(sweep: Sweep) -> list[Pair]:
    """Returns what is compared; two cells that are both another setting's stand there alone."""
    baseline = baseline_of(sweep)
    found = (
        (setting, norm, sweep.cell(setting, norm), sweep.cell(setting, baseline))
        for setting in sweep.settings
        for norm in sweep.norms
        if norm != baseline
    )
    return [
        pair
        for pair in found
        if pair[2] and pair[3] and not all(row.shared_with for row in (*pair[2], *pair[3]))
    ]


def accuracy_in_points(row: Row) -> float | None:
    """Returns a run's final test accuracy in percent."""
    accuracy = row.number("test_accuracy")
    return None if accuracy is None else 100 * accuracy


def compare(
    runs: Sequence[Row],
    base: Sequence[Row],
    comparisons: int,
    interval: str,
    measure: Measure = accuracy_in_points,
) -> tuple[Difference, tuple[str, ...]]:
    """Returns the paired difference runs − base of a measure, and which seeds do not pair and why.

    Runs pair by seed if they ended with a measurement and the hashes of what they should share
    agree. `interval` is one of statistics.INTERVALS.
    """
    ended = [[row for row in group if row.state in MEASURED] for group in (runs, base)]
    reasons = {a.seed: unpaired(a, b) for a in ended[0] for b in ended[1] if a.seed == b.seed}
    marks = tuple(f"seed {seed} not paired: {why}" for seed, why in reasons.items() if why)
    ours, theirs = (
        {
            row.seed: value
            for row in group
            if row.seed is not None and not reasons.get(row.seed) and row.state in MEASURED
            if (value := measure(row)) is not None
        }
        for group in (runs, base)
    )
    return paired_difference(ours, theirs, comparisons, interval), marks


def over_seeds(
    runs: Sequence[Row], constant: float, comparisons: int, interval: str, measure: Measure
) -> Difference:
    """Returns the difference of a measure from a constant, over the seeds that ended with it."""
    values = {
        row.seed: value
        for row in runs
        if row.seed is not None and row.state in MEASURED
        if (value := measure(row)) is not None
    }
    return paired_difference(values, dict.fromkeys(values, constant), comparisons, interval)


def _cells(
    runs: Sequence[Row], base: Sequence[Row], comparisons: int, interval: str
) -> tuple[Cell, ...]:
    difference, marks = compare(runs, base, comparisons, interval)
    dagger = DAGGER if all(row.shared_with for row in runs) else ""
    if difference.mean is None:
        return Cell(detail=dagger, marks=marks), Cell("0"), Cell("no pair")
    spread = "" if difference.interval is None else difference.interval.text(2)
    value = Cell(f"{difference.mean:+.2f}", spread, dagger, marks, strong=difference.decided)
    verdict = Cell(_verdict(difference), strong=difference.decided)
    return value, Cell(str(difference.n)), verdict


def _verdict(difference: Difference) -> str:
    if difference.mean is not None and difference.decided:
        return "higher" if difference.mean > 0 else "lower"
    total = seeds_needed(difference)
    if total is None:
        return "undecided"
    more = max(total - difference.n, 1)
    return f"undecided; about {more:,} more seed{'' if more == 1 else 's'}"


def unpaired(a: Row, b: Row) -> str:
    """Returns what two runs of one seed do not share though they should, "" if they are paired.

    Initial values are to be shared by nets that are the same up to their normalizers; between
    others, as of standardized weights and plain ones, they are part of what is compared.
    """
    for what in NEEDED:
        if not (a.pairing.get(what) and b.pairing.get(what)):
            return f"{what} not recorded"
    # A parameter need not be in both; anything else that only one of them says is not shared.
    common = a.pairing.keys() & b.pairing.keys()
    common |= {x for x in a.pairing.keys() | b.pairing.keys() if not x.startswith("initial ")}
    if not _same_net(a, b):
        common = {x for x in common if not x.startswith("initial ")}
    differs = (what for what in sorted(common) if a.pairing.get(what) != b.pairing.get(what))
    return next(differs, "")


def _same_net(a: Row, b: Row) -> bool:
    return all(a.config.get(part) == b.config.get(part) for part in ("model", "conv"))

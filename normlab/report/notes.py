"""What the report says in sentences: a summary, what to beware of, and how to read the numbers."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from normlab.report.axis import AXES, axes_of, left_out
from normlab.report.bootstrap import COVERAGE, NUM_RESAMPLES
from normlab.report.claim import PublishedTable
from normlab.report.files import flatten, one_line, plain_text
from normlab.report.row import MEASURED, Sweep, digest
from normlab.report.statistics import CONFIDENCE, ENOUGH_TO_RESAMPLE, INTERVALS
from normlab.report.tables import DAGGER, NOTHING, count_states

DIFFERENCES = (
    "Test accuracy minus that of {baseline}, in points, seed by seed: two runs of a seed share "
    "data order, augmentation and, in nets that differ in normalizers alone, the initial values of "
    "common parameters. Mean {interval} at "
    "{level}. Bold: the interval excludes zero. Otherwise: how many more seeds "
    "give an 80% chance of it, should difference and spread be as seen; from few seeds, a rough "
    "guess."
)
COSTS = (
    "Test accuracy in percent with running, batch and recomputed statistics, as above; "
    "times are medians over runs."
)
SWEPT = (
    "Test error in percent, running statistics: mean over seeds and {interval}; lines and "
    "markers as above."
)
CURVES = (
    "Line: mean over seeds; band: lowest to highest seed. Line and band end where the first seed "
    "ends; the seeds that go on are drawn thin. × ends a diverged seed. Panels share one vertical "
    "scale; reaching high accuracies, it is stretched towards 100%, so that equal distances are "
    "equal ratios of the error."
)
SECONDS = (
    "Seconds are those of training alone, without compilation and evaluation, each step's mean "
    "over seeds, on the machine and under the load of that time: only a rough comparison."
)
ABSENT = "no such field"
_MOST = 12  # items of one kind that are listed; the rest is counted


def headline(sweep: Sweep) -> str:
    """Returns what a cell of the table shows."""
    return f"Percent; mean over seeds {_interval(sweep)}; n seeds; running statistics."


def curves(sweep: Sweep) -> str:
    """Returns what the learning curves show, and which runs some of them leave out."""
    axes = axes_of(sweep)
    *others, last = ("optimizer steps" if axis == "steps" else AXES[axis] for axis in axes)
    parts = [f"Test accuracy against {', '.join(others)}{' or ' if others else ''}{last}.", CURVES]
    parts += [SECONDS] if "seconds" in axes else []
    for axis in axes:
        missing = left_out(sweep, axis)
        if missing:
            parts.append(
                f"{missing} of {_count(len(sweep.runs()), 'run')} cannot be drawn against "
                f"{axis}: their {_SAID_IN[axis]} does not say it."
            )
    return " ".join(parts)


_SAID_IN = {"steps": "metrics.jsonl", "epochs": "manifest.json", "seconds": "timing.jsonl"}


def swept(sweep: Sweep) -> str:
    """Returns what the panels of error against a swept field show."""
    return SWEPT.format(interval=f"{CONFIDENCE:.0%} {INTERVALS[sweep.interval]}")


def _interval(sweep: Sweep, level: str = f"{CONFIDENCE:.0%} ") -> str:
    """Returns how an interval is written and what it is."""
    name = f"{level}{INTERVALS[sweep.interval]}"
    return f"± half-width of the {name}" if sweep.interval == "t" else f"[{name}]"


def differences(sweep: Sweep, baseline: str, comparisons: int) -> str:
    """Returns what the table of paired differences shows."""
    level = f"{CONFIDENCE:.0%}"
    if comparisons > 1:
        each = 1 - (1 - CONFIDENCE) / comparisons
        level = f"{each:.2%}, so that {level} holds for all {comparisons} together (Bonferroni)"
    return DIFFERENCES.format(baseline=baseline, interval=_interval(sweep, ""), level=level)


def verdict(sweep: Sweep) -> str:
    """Returns the outcome in a sentence's place, "" for a sweep that is no experiment's."""
    if sweep.claim is None:
        return ""
    if not sweep.claim.outcome:
        return "No verdict yet."
    doubts = [] if sweep.claim.rows == digest(sweep) else ["of earlier rows: run it again"]
    if sweep.claim.judged_by != sweep.interval:
        theirs = INTERVALS.get(sweep.claim.judged_by, sweep.claim.judged_by)
        doubts.append(f"by the {theirs}, where the tables have the {INTERVALS[sweep.interval]}")
    doubt = f" ({'; '.join(doubts)})" if doubts else ""
    return f"{sweep.claim.outcome.capitalize()}{doubt}."


def published(table: PublishedTable) -> list[str]:
    """Returns where a paper's numbers come from and how far they compare."""
    found = [f"{table.source}: {table.setting}." if table.source else f"{table.setting}."]
    if table.quantity:
        found.insert(0, f"{table.quantity[:1].upper()}{table.quantity[1:]}.")
    if table.sure:
        found.append(f"How sure: {table.sure}.")
    if table.as_error:
        found.append("Published as error; shown as 100 minus it.")
    if not table.same_setting:
        found.append("Not this scale's setting: compare order and sign, not values.")
    return found


def quantity(name: str, sweep: Sweep) -> str:
    """Returns what a table of a quantity shows."""
    return f"{name[:1].upper()}{name[1:]}: mean over seeds with {_interval(sweep)}; n seeds."


def probe(sweep: Sweep) -> str:
    """Returns what the panels of the probe show."""
    layer, unit = (_common(sweep, f"probe.{name}") for name in ("layer", "unit"))
    names = {name for row in sweep.rows for name in row.probe}
    shown = ", ".join(f"{name[1:]}th" for name in sorted(names, key=lambda x: float(x[1:])))
    return (
        f"The {shown} percentiles of what unit {unit} of {layer} gives to its activation, over the "
        "test set with running statistics, against optimizer steps; first seed."
    )


def choices(sweep: Sweep) -> list[str]:
    """Returns which candidate each tuned cell shows, and how the others did."""
    found = []
    for (setting, norm), choice in sweep.chosen.items():
        most = max(choice.counts.values())
        means = ", ".join(
            f"{name} {NOTHING if mean is None else format(100 * mean, '.2f')}"
            + (f" ({choice.counts[name]} of {most} seeds)" if choice.counts[name] < most else "")
            for name, mean in choice.means.items()
        )
        where = f"{norm} in {setting}" if len(sweep.settings) > 1 else norm
        found.append(f"{where}: {choice.tuned}, the best mean validation accuracy of {means}.")
    return found


def title(sweep: Sweep) -> str:
    """Returns e.g. `Normalizers on digits (cnn)`, from what all configs have in common."""
    if sweep.claim is not None:
        return f"{sweep.claim.name}, scale {sweep.claim.scale}"
    data, model = _common(sweep, "data.name"), _common(sweep, "model.kind")
    where = f"{data} ({model})" if data and model else data or sweep.title
    return f"Normalizers on {where}"


def summary(sweep: Sweep) -> list[str]:
    """Returns one sentence on what was run, then what came out of each setting."""
    runs = sweep.runs()
    seeds = {len(sweep.cell(row.setting, row.norm)) for row in sweep.rows}
    each = _count(min(seeds), "seed")
    if len(seeds) > 1:
        each = f"{min(seeds)} to {_count(max(seeds), 'seed')}"
    states = count_states(runs)
    if "," not in states:
        states = f"{'all ' if len(runs) > 1 else ''}{states.partition(' ')[2]}"
    sentences = [
        f"{_count(len(sweep.norms), 'normalizer')} in {_count(len(sweep.settings), 'setting')}, "
        f"{each} each: {_count(len(runs), 'run')}, {states}."
    ]
    for setting in list(sweep.settings)[:_MOST]:
        means = []
        for norm in sweep.norms:
            values = [
                value
                for row in sweep.cell(setting, norm)
                if row.state in MEASURED and (value := row.number("test_accuracy")) is not None
            ]
            if values:
                means.append((sum(values) / len(values), norm))
        if len(means) > 1:
            (low, worst), (high, best) = min(means), max(means)
            sentences.append(
                f"{setting}: mean test accuracy from {100 * low:.1f}% ({worst}) "
                f"to {100 * high:.1f}% ({best})."
            )
    return sentences


def warnings(sweep: Sweep) -> list[str]:
    """Returns what a reader must know before believing the table; [] if all is in order."""
    runs = sweep.runs()
    found = [*sweep.notes, *_few_seeds(sweep)]
    for measured in sweep.claim.quantities if sweep.claim else ():
        if measured.failure:
            found.append(f"{measured.name} could not be measured on some run: {measured.failure}.")
    if sweep.claim is not None and sweep.overrides:
        given = ", ".join(overrides(sweep.overrides))
        found.append(f"Not the scale as declared: the command line set {given}.")
    unfinished = [row for row in runs if row.state not in MEASURED]
    if unfinished:
        found.append(
            f"{len(unfinished)} of {_count(len(runs), 'run')} without a result: "
            f"{count_states(unfinished)}."
        )
    diverged = []
    for setting in sweep.settings:
        for norm in sweep.norms:
            rows = sweep.cell(setting, norm)
            count = sum(row.state == "diverged" for row in rows)
            if count:
                diverged.append(f"{norm} in {setting} ({count}/{len(rows)})")
    if diverged:
        found.append(f"Diverged: {', '.join(_shortened(diverged))}.")
    for what, values in provenance(sweep).items():
        if len(values) > 1:
            found.append(f"The runs differ in {what}: {', '.join(counted(values))}.")
        elif what == "git commit" and "uncommitted" in "".join(values):
            found.append("The code had uncommitted changes, so the commit alone does not give it.")
    remarks = []
    for row in runs:
        failure = [row.message] if row.state == "failed" and row.message else []
        for note in (*failure, *row.notes):
            seed = "" if row.seed is None else f", seed {row.seed}"
            remarks.append(f"Run {row.id} ({row.setting}, {row.norm}{seed}): {note}")
    return found + _shortened(remarks)


def _few_seeds(sweep: Sweep) -> list[str]:
    seeds = min(len(sweep.cell(row.setting, row.norm)) for row in sweep.rows)
    if sweep.interval != "bootstrap" or seeds >= ENOUGH_TO_RESAMPLE:
        return []
    return [
        f"Bootstrap intervals of fewer than {ENOUGH_TO_RESAMPLE} seeds decide nothing, as they are "
        "far too narrow: called "
        f"{CONFIDENCE:.0%}, they cover the truth in {_coverage()}. The t interval does not have "
        "this fault."
    ]


def _coverage() -> str:
    (n, share), *others = COVERAGE.items()
    rest = ", ".join(f"{share:.0%} with {n}" for n, share in others)
    return f"{share:.0%} of experiments with {n} seeds, {rest} (simulated, normal values)"


def provenance(sweep: Sweep) -> dict[str, dict[str, int]]:
    """Returns {what: {value: number of runs}} of commit, versions, devices and the like."""
    recorded = [row.provenance for row in sweep.runs() if row.provenance]
    names = dict.fromkeys(name for values in recorded for name in values)
    return {
        name: dict(Counter(values.get(name, "not recorded") for values in recorded))
        for name in names
    }


def config(sweep: Sweep) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Returns ({field: {value: number of runs}} where configs differ, {field: value} elsewhere).

    Without the seed.
    """
    flat = [flatten(row.config) for row in sweep.runs() if row.config]
    names = dict.fromkeys(name for fields in flat for name in fields)
    differing, common = {}, {}
    for name in names.keys() - {"seed", "schema_version"}:
        texts = (plain_text(x[name]) if name in x else ABSENT for x in flat)
        values = dict(Counter(texts))
        if len(values) > 1:
            differing[one_line(name)] = values
        else:
            common[one_line(name)] = next(iter(values))
    return dict(sorted(differing.items())), dict(sorted(common.items()))


def counted(values: Mapping[str, int]) -> list[str]:
    """Returns each value, with its number of runs where there are several values."""
    if len(values) == 1:
        return list(values)
    return [f"{value} ({_count(count, 'run')})" for value, count in values.items()]


def overrides(fields: Mapping[str, Any]) -> list[str]:
    """Returns a setting's fields as one types them, e.g. `optim.base_lr=0.5`."""
    return [f"{one_line(name)}={plain_text(value)}" for name, value in fields.items()]


def reading(sweep: Sweep) -> list[str]:
    """Returns how to read the tables and curves: every rule that decides a number."""
    notes = [
        "A cell is the mean over n seeds of the final test accuracy in percent, evaluated with "
        f"running statistics over every test example once, {_interval(sweep)}.",
        _READING[sweep.interval],
        "The interval covers other seeds (initial values, order of the data) on this same test "
        "set, not other test sets. Overlapping intervals prove no equality, and the largest of "
        "many means is partly luck: the paired differences decide.",
        "A diverged run counts with the accuracy that it had when it stopped, and its cell says "
        "so, e.g. 1/3 diverged. Without such a measurement it is missing from the mean, which then "
        "flatters: read the mark with it. Failed, interrupted, running and planned runs are in no "
        "mean and are marked too.",
        "Step, compile and total seconds are medians over the runs of a cell, measured as the "
        "sweep ran, its workers sharing the machine. Compilation is not part of the step.",
        "Batch statistics: each test batch normalized by its own statistics, in batches as in "
        "training, instead of the running ones. Recomputed statistics: exact ones, from a pass "
        f"over the training set. Only normalizers with state have both ({NOTHING} elsewhere).",
    ]
    return notes + footnotes(sweep)


_READING = {
    "t": (
        "Intervals from few seeds are wide by design: 2.48 standard deviations to each side for "
        "3 seeds, 1.24 for 5, 0.72 for 10. One seed has no interval. A t interval knows no bounds "
        "and can pass 0% or 100%."
    ),
    "bootstrap": (
        f"Intervals are bias-corrected and accelerated bootstrap intervals (BCa, Efron 1987) of "
        f"{NUM_RESAMPLES:,} resamples, the same ones in every report. They suppose no normal "
        "distribution and stay within the values seen, which makes them too narrow for few seeds: "
        f"called {CONFIDENCE:.0%}, they cover the truth in {_coverage()}. One seed has no "
        "interval. How many more seeds it takes is the t test's count."
    ),
}


def footnotes(sweep: Sweep) -> list[str]:
    """Returns what the daggers in the tables mean; [] if there are none."""
    shared = {(row.setting, row.shared_with): None for row in sweep.rows if row.shared_with}
    return [
        f"{DAGGER} In {setting}: the very runs of {earlier}, since this setting cannot change "
        "what these normalizers do. A shared run counts once in each setting."
        for setting, earlier in shared
    ]


def _common(sweep: Sweep, name: str) -> str:
    """Returns the value of a config field that all runs have, "" if they differ."""
    values = {str(flatten(row.config).get(name, "")) for row in sweep.rows if row.config}
    return one_line(values.pop()) if len(values) == 1 else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shortened(items: Iterable[str]) -> list[str]:
    items = list(items)
    rest = len(items) - _MOST
    return items if rest <= 0 else [*items[:_MOST], f"and {rest} more, see the list of runs"]

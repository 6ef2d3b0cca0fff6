"""Verdicts: what a claim of a paper predicts, tested on the rows of a sweep.

A hypothesis is about two cells of the table. It is tested with the paired difference by seed and
its two-sided interval (of the kind that the sweep has), at 95% for all hypotheses of a claim
together (Bonferroni). A claim is reproduced if all of its hypotheses hold, not reproduced if one is
contradicted, and underpowered otherwise: then the seeds were too few to tell.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from normlab.report import quantity
from normlab.report.differences import Measure, accuracy_in_points, compare, over_seeds
from normlab.report.files import number
from normlab.report.quantity import Quantity
from normlab.report.row import MEASURED, Row, Sweep, digest
from normlab.report.statistics import (
    ENOUGH_TO_RESAMPLE,
    INTERVALS,
    POWER,
    Difference,
    seeds_needed,
)

OUTCOMES = ("reproduced", "not reproduced", "underpowered")
BROKEN = "no verdict"
"""The outcome where the verdict's own code failed."""

TEST = (
    "Paired differences by seed, two-sided {interval}s; {together}. How many seeds would decide is "
    "said of each hypothesis by itself, for {power:.0%} power."
)

TOGETHER = {
    "t": "95% holds for all hypotheses together (Bonferroni)",
    "bootstrap": (
        "corrected for all hypotheses together (Bonferroni), which a bootstrap reaches only with "
        f"many seeds; with fewer than {ENOUGH_TO_RESAMPLE} nothing is decided"
    ),
}

Place = str | tuple[str, str]
"""A normalizer, or (normalizer, setting) where there are several settings."""


@dataclass(frozen=True)
class Verdict:
    """The answer to a claim, with what it rests on."""

    outcome: str  # one of OUTCOMES
    sentences: tuple[str, ...]  # one for each hypothesis
    test: str  # the statistical test, in words


@dataclass(frozen=True)
class Hypothesis:
    """`a` exceeds `b` by more than `margin`; or, if `equal`, they differ by less.

    Where `b` is a number, such as theory gives, the mean of `a` is tested against it.
    """

    a: Place
    b: Place | float
    margin: float = 0.0
    equal: bool = False
    measure: Measure = accuracy_in_points
    what: str = ""  # the measure in words, "" for test accuracy
    unit: str = "points"

    def judge(self, sweep: Sweep, comparisons: int) -> tuple[bool | None, str]:
        """Returns (holds, contradicted or None if undecided; a sentence with the numbers)."""
        a = _rows(sweep, self.a)
        if isinstance(self.b, (int, float)):
            b, marks = (), ()  # type: tuple[Row, ...], tuple[str, ...]
            difference = over_seeds(a, self.b, comparisons, sweep.interval, self.measure)
        else:
            b = _rows(sweep, self.b)
            difference, marks = compare(a, b, comparisons, sweep.interval, self.measure)
        holds = self._holds(difference)
        about = f"{self.what} of " if self.what else ""
        statement = f"{about}{_words(self.a)} {self._relation()} {_words(self.b)}"
        answer = {True: "holds", False: "contradicted", None: "undecided"}[holds]
        numbers = "; ".join([_numbers(difference, self.unit), *marks])
        if b and {row.id for row in a} == {row.id for row in b}:
            numbers = "the very same runs"
        # To lie within two bounds takes more than to lie beyond one: half the risk for each.
        power = (1 + POWER) / 2 if self.equal else POWER
        boundary = self._from_the_boundary(difference)
        total = seeds_needed(boundary, power) if holds is None else None
        if total:
            numbers += f"; about {total:,} in all would decide"
        return holds, f"{statement}: {answer} ({numbers})."

    def _relation(self) -> str:
        margin = f"{self.margin:g} {self.unit}".rstrip()
        if self.equal:
            return f"within {margin} of"
        return f"more than {margin} above" if self.margin else "above"

    def _from_the_boundary(self, difference: Difference) -> Difference:
        """Returns the difference with its mean counted from where the answer changes."""
        if difference.mean is None:
            return difference
        mean = abs(difference.mean) if self.equal else difference.mean
        return replace(difference, mean=mean - self.margin)

    def _holds(self, difference: Difference) -> bool | None:
        interval = difference.believed
        if interval is None:
            return None
        low, high = interval.low, interval.high
        if self.equal:
            inside = -self.margin < low and high < self.margin
            outside = low > self.margin or high < -self.margin
            return True if inside else False if outside else None
        return True if low > self.margin else False if high < self.margin else None


def above(a: Place, b: Place | float, margin: float = 0.0, **of_what: Any) -> Hypothesis:
    """Returns the hypothesis that a − b is above `margin`.

    `of_what`: `measure`, `what` and `unit` of a hypothesis about something else than test accuracy.
    """
    return Hypothesis(a, b, margin, **of_what)


def close(a: Place, b: Place | float, margin: float, **of_what: Any) -> Hypothesis:
    """Returns the hypothesis that a and b differ by less than `margin` (equivalence)."""
    return Hypothesis(a, b, margin, equal=True, **of_what)


def all_of(*hypotheses: Hypothesis) -> Callable[[Sweep], Verdict]:
    """Returns the verdict function of a claim that stands or falls with these hypotheses.

    The function has them as its attribute `hypotheses`, so that they can be checked before any run.
    Raises ValueError if there is none: a claim of nothing would always be reproduced.
    """
    if not hypotheses:
        raise ValueError("all_of() names no hypothesis")

    def verdict(sweep: Sweep) -> Verdict:
        judged = [hypothesis.judge(sweep, len(hypotheses)) for hypothesis in hypotheses]
        answers = [holds for holds, _ in judged]
        outcome = "reproduced" if all(answers) else "underpowered"
        if False in answers:
            outcome = "not reproduced"
        sentences = tuple(sentence for _, sentence in judged)
        test = TEST.format(
            interval=INTERVALS[sweep.interval], together=TOGETHER[sweep.interval], power=POWER
        )
        return Verdict(outcome, sentences, test)

    verdict.hypotheses = hypotheses  # type: ignore[attr-defined]
    return verdict


def judge(verdict: Callable[[Sweep], Verdict], sweep: Sweep) -> Verdict:
    """Returns the verdict on the rows; one that fails says so and is no end of a night's sweep."""
    try:
        found = verdict(sweep)
        _check(found)
    except (Exception, SystemExit) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return Verdict(
            BROKEN, (f"The verdict's code failed: {type(error).__name__}: {reason}",), ""
        )
    return found


def _check(found: Any) -> None:
    """Raises TypeError or ValueError for what a verdict's code may return and no file can keep."""
    if not isinstance(found, Verdict):
        raise TypeError(f"it returned {found!r}, which is no Verdict")
    if found.outcome not in OUTCOMES:
        raise ValueError(f"outcome {found.outcome!r} is none of {', '.join(OUTCOMES)}")
    if not isinstance(found.sentences, (tuple, list)):
        raise TypeError(f"sentences {found.sentences!r} are no tuple of texts")
    for name, text in (*(("sentence", text) for text in found.sentences), ("test", found.test)):
        if not isinstance(text, str):
            raise TypeError(f"{name} {text!r} is no text")


def as_json(
    verdict: Verdict, sweep: Sweep, quantities: Mapping[str, Measure] | None = None
) -> dict[str, object]:
    """Returns the verdict as it is kept in a sweep's folder, with its interval and rows' digest.

    And with the `quantities` of its rows: {name: measure}.
    """
    measured = [measure(name, x, sweep) for name, x in (quantities or {}).items()]
    return {
        "schema_version": 1,
        "outcome": verdict.outcome,
        "sentences": list(verdict.sentences),
        "test": verdict.test,
        "interval": sweep.interval,
        "rows": digest(sweep),
        "quantities": [quantity.as_json(found) for found in measured],
    }


def measure(name: str, of_row: Measure, sweep: Sweep) -> Quantity:
    """Returns a quantity of all runs that ended with a measurement and have it.

    Where the function of a row fails, or gives no finite number, the run is without, and the last
    such failure is told.
    """
    values: dict[tuple[str, str], dict[int, float]] = {}
    failure = ""
    for setting in sweep.settings:
        for norm in sweep.norms:
            for row in sweep.cell(setting, norm):
                if row.seed is None or row.state not in MEASURED:
                    continue
                try:
                    value = of_row(row)
                except (Exception, SystemExit) as error:
                    failure = (
                        f"{type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}"
                    )
                    continue
                if value is None:
                    continue
                if number(value) is None:
                    failure = f"{value!r} is no finite number"[:100]
                    continue
                values.setdefault((setting, norm), {})[row.seed] = value
    return Quantity(name, values, failure)


def _rows(sweep: Sweep, place: Place) -> tuple[Row, ...]:
    norm, setting = (place, None) if isinstance(place, str) else place
    if setting is None:
        if len(sweep.settings) != 1:
            raise ValueError(f"{norm!r} stands in {len(sweep.settings)} settings; name one")
        [setting] = sweep.settings
    rows = sweep.cell(setting, norm)
    if not rows:
        raise ValueError(f"the sweep has no {norm!r} in setting {setting!r}")
    return rows


def _words(place: Place | float) -> str:
    if isinstance(place, (int, float)):
        return f"{place:g}"
    return place if isinstance(place, str) else f"{place[0]} in {place[1]}"


def _numbers(difference: Difference, unit: str) -> str:
    if difference.mean is None:
        return "no pair of runs"
    decimals = 2 if unit else 4
    unit = f" {unit}" if unit else ""
    if difference.interval is None:
        why = "one seed" if difference.n == 1 else f"{difference.n} seeds without spread"
        return f"{difference.mean:+.{decimals}f}{unit} from {why}, so no interval"
    spread = difference.interval.text(decimals)
    return f"{difference.mean:+.{decimals}f} {spread}{unit}, {difference.n} seeds"

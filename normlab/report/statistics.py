"""Mean, standard deviation and 95% interval over seeds: Student's t, or bootstrap.

Student 1908, "The probable error of a mean": for n independent normal values the mean lies within
t(0.975, n-1) * s / sqrt(n) of the truth in 95% of experiments. At n = 3 the factor t is 4.30, so
such an interval is wide by design: three seeds say little, and the interval says so. The bootstrap
(`bootstrap.py`) asks for no normal values, but for more of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95

INTERVALS = {"t": "t interval", "bootstrap": "BCa bootstrap interval"}
"""The kinds of interval, and what the report calls them; the first is the default."""

ENOUGH_TO_RESAMPLE = 10
"""Values from which on a bootstrap interval decides anything: of few, most are of one sign, and
then no resample, at whatever level, has the other."""

POWER = 0.8  # chance of a decision for which seeds are counted

ROUNDING = 1e-9  # relative: values that are closer are the same up to rounding


@dataclass(frozen=True)
class Interval:
    """Where the mean lies, in the unit of the values."""

    low: float
    high: float
    kind: str = "t"  # one of INTERVALS

    @property
    def half_width(self) -> float:
        """Half of the distance from end to end; a t interval is the mean ± this."""
        return (self.high - self.low) / 2

    def text(self, decimals: int) -> str:
        """Returns `± 1.23`, or `[98.10, 99.45]` where the mean is not in the middle."""
        if self.kind == "t":
            return f"± {self.half_width:.{decimals}f}"
        return f"[{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


@dataclass(frozen=True)
class Summary:
    """Values over seeds, in the unit of the values."""

    n: int  # number of values
    mean: float | None  # None if n = 0
    std: float | None  # with n - 1 in the denominator; None if n < 2
    interval: Interval | None  # of the mean (95% unless asked); None if n < 2 or all are equal


def summarize(values: Iterable[float], confidence: float = CONFIDENCE, kind: str = "t") -> Summary:
    """Returns the summary of finite `values`, one per seed, with an interval of one of INTERVALS.

    Equal values have none: accuracies are counts of test images, so two seeds that fall on the same
    count are common, and say nothing of the spread.
    """
    import numpy as np

    array = np.fromiter(values, dtype=np.float64)
    n = array.size
    if n == 0:
        return Summary(0, None, None, None)
    mean = float(array.mean())
    if n == 1:
        return Summary(1, mean, None, None)
    std = float(array.std(ddof=1))
    if std <= ROUNDING * abs(mean):
        return Summary(n, mean, 0.0, None)
    if kind == "bootstrap":
        from normlab.report.bootstrap import bca_interval

        ends = bca_interval(array, confidence)
    else:
        half_width = t_quantile((1 + confidence) / 2, n - 1) * std / n**0.5
        ends = mean - half_width, mean + half_width
    return Summary(n, mean, std, Interval(*ends, kind))


def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Returns the quantile of Student's t, e.g. t(0.975, 2) = 4.302653."""
    # scipy.special has the same inverse as scipy.stats, which takes seconds to import.
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, probability))


# Paired comparison -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Paired differences a − b over seeds that both have, in the unit of the values."""

    n: int  # seeds in both
    mean: float | None  # None if n = 0
    std: float | None  # of the differences, n - 1 in the denominator; None if n < 2
    interval: Interval | None  # of the mean, at `confidence`; None if n < 2 or all are equal
    confidence: float  # of this interval: 1 − 0.05 / number of comparisons (Bonferroni)

    @property
    def decided(self) -> bool:
        """True if the interval excludes zero, and is one to be believed."""
        found = self.believed
        return found is not None and (found.low > 0 or found.high < 0)

    @property
    def believed(self) -> Interval | None:
        """The interval if a decision may rest on it; a bootstrap of few values is too narrow."""
        few = self.n < ENOUGH_TO_RESAMPLE
        bootstrap = self.interval is not None and self.interval.kind == "bootstrap"
        return None if few and bootstrap else self.interval


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], comparisons: int = 1, kind: str = "t"
) -> Difference:
    """Returns the paired difference a − b of {seed: value}, over the seeds that both have.

    Seeds share data order, augmentation and initial values, so what a seed does to both drops out.
    With `comparisons` intervals in one family, each is at 1 − 0.05/comparisons: the chance that
    any of them misses its truth is at most 5% (Bonferroni; Dunn 1961). `kind` is one of INTERVALS.
    """
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    summary = summarize((a[seed] - b[seed] for seed in a if seed in b), confidence, kind)
    return Difference(summary.n, summary.mean, summary.std, summary.interval, confidence)


def seeds_needed(difference: Difference, power: float = POWER, limit: int = 10_000) -> int | None:
    """Returns the smallest n at which a difference as seen is decided with probability `power`.

    The usual approximation for a paired t test (Student 1908; Guenther 1981): the smallest n with
    |mean| ≥ (t(1 − α/2, n − 1) + t(power, n − 1)) · std / √n, whatever the kind of the interval.
    None if the difference is zero, is not known (n < 2), or takes more than `limit` seeds. The
    observed mean and spread stand for the true ones, so with few seeds this is a rough guide and no
    promise.
    """
    if not difference.mean or difference.std is None:
        return None
    tail = (1 + difference.confidence) / 2
    effect = abs(difference.mean) / difference.std if difference.std else float("inf")

    def enough(n: int) -> bool:
        factor = t_quantile(tail, n - 1) + t_quantile(power, n - 1)
        return effect >= factor / n**0.5

    if not enough(limit):
        return None
    low, high = 1, limit  # enough(high) holds; below 2 there is no interval
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high

"""Mean, standard deviation and 95% t interval over seeds.

Student 1908, "The probable error of a mean": for n independent normal values the mean lies within
t(0.975, n-1) * s / sqrt(n) of the truth in 95% of experiments. At n = 3 the factor t is 4.30, so
such an interval is wide by design: three seeds say little, and the interval says so.
"""

from collections.abc import Iterable
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Values over seeds, in the unit of the values."""

    n: int  # number of values
    mean: float | None  # None if n = 0
    std: float | None  # with n - 1 in the denominator; None if n < 2
    half_width: float | None  # of the 95% t interval of the mean; None if n < 2


def summarize(values: Iterable[float]) -> Summary:
    """Returns the summary of finite `values`, one per seed."""
    import numpy as np

    array = np.fromiter(values, dtype=np.float64)
    n = array.size
    if n == 0:
        return Summary(0, None, None, None)
    mean = float(array.mean())
    if n == 1:
        return Summary(1, mean, None, None)
    std = float(array.std(ddof=1))
    return Summary(n, mean, std, t_quantile((1 + CONFIDENCE) / 2, n - 1) * std / n**0.5)


def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Returns the quantile of Student's t, e.g. t(0.975, 2) = 4.302653."""
    # scipy.special has the same inverse as scipy.stats, which takes seconds to import.
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, probability))

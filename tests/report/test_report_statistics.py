"""Mean, standard deviation and t interval against values computed by hand."""

import re

import numpy as np
import pytest

from normlab.report.notes import reading
from normlab.report.rows import load
from normlab.report.statistics import (
    Difference,
    paired_difference,
    seeds_needed,
    summarize,
    t_quantile,
)


def test_three_values():
    summary = summarize([1.0, 2.0, 3.0])
    assert (summary.n, summary.mean, summary.std) == (3, 2.0, 1.0)
    # t(0.975, 2) * 1 / sqrt(3) = 4.302653 / 1.732051
    assert summary.interval.half_width == pytest.approx(2.484138, abs=1e-6)


def test_eight_values():
    summary = summarize([2, 4, 4, 4, 5, 5, 7, 9])
    assert summary.mean == 5.0
    # Squared deviations: 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, over n - 1 = 7.
    assert summary.std == pytest.approx((32 / 7) ** 0.5)
    # t(0.975, 7) = 2.364624; 2.364624 * 2.138090 / sqrt(8)
    assert summary.interval.half_width == pytest.approx(1.787488, abs=1e-5)


def test_quantile_of_two_degrees_of_freedom_has_a_closed_form():
    # t(p, 2) = (2p - 1) / sqrt(2 p (1 - p)) = 0.95 / sqrt(0.04875)
    assert t_quantile(0.975, 2) == pytest.approx(0.95 / 0.04875**0.5, rel=1e-9)
    assert t_quantile(0.975, 2) == pytest.approx(4.302653, abs=1e-6)


def test_many_degrees_of_freedom_approach_the_normal_distribution():
    assert t_quantile(0.975, 10**7) == pytest.approx(1.959964, abs=1e-6)


def test_one_value_has_no_interval():
    summary = summarize([0.5])
    assert (summary.n, summary.mean, summary.std, summary.interval) == (1, 0.5, None, None)


def test_no_value_has_no_mean():
    assert summarize([]).mean is None


def test_equal_values_have_no_interval():
    summary = summarize([0.25, 0.25, 0.25])
    assert (summary.mean, summary.std, summary.interval) == (0.25, 0.0, None)


@pytest.mark.parametrize("comparisons", [1, 15])
def test_equals_measured_in_whole_images_are_not_declared_different(comparisons):
    """Accuracies of 360 images, whose spread is one image: seeds often fall on the same count."""
    draw = np.random.default_rng(0)
    false = 0
    for _ in range(4_000):
        a, b = (np.round(draw.normal(355, 1, 3)) / 360 for _ in range(2))
        false += paired_difference(dict(enumerate(a)), dict(enumerate(b)), comparisons).decided
    stated = 0.05 / comparisons
    # Three standard errors of the count, and a tenth for what rounding does to the t interval.
    assert false / 4_000 < 1.1 * stated + 3 * (stated / 4_000) ** 0.5


def test_the_page_tells_the_true_width_of_intervals(make_sweep, tmp_path):
    text = " ".join(reading(load(make_sweep(tmp_path))))
    told = re.search(
        r"([\d.]+) standard deviations to each side for 3 seeds, ([\d.]+) for 5, ([\d.]+) for 10",
        text,
    )
    assert told
    widths = [f"{t_quantile(0.975, n - 1) / n**0.5:.2f}" for n in (3, 5, 10)]
    assert list(told.groups()) == widths


# Paired comparison -------------------------------------------------------------------------------


def test_a_paired_difference_by_hand():
    a, b = {0: 99.0, 1: 98.0, 2: 97.0, 7: 50.0}, {2: 96.0, 1: 97.5, 0: 98.5, 9: 10.0}
    difference = paired_difference(a, b)
    # Seeds 0, 1, 2 are in both: 0.5, 0.5, 1.0; mean 2/3, std √(1/12) = 0.288675,
    # half-width 4.302653 · 0.288675 / √3 = 0.717109: not decided.
    assert difference.n == 3
    assert difference.mean == pytest.approx(2 / 3)
    assert difference.interval.half_width == pytest.approx(0.717109, abs=1e-6)
    assert not difference.decided


def test_pairing_decides_what_means_alone_do_not():
    """Two series far apart between seeds, and always 0.1 apart within one."""
    a = {0: 90.1, 1: 95.1, 2: 99.12}
    b = {0: 90.0, 1: 95.0, 2: 99.0}
    assert paired_difference(a, b).decided
    assert summarize(a.values()).interval.half_width > 10


def test_many_comparisons_widen_every_interval():
    a, b = {0: 1.0, 1: 2.0, 2: 3.5}, {0: 0.0, 1: 0.5, 2: 2.5}
    alone, among_five = paired_difference(a, b), paired_difference(a, b, comparisons=5)
    assert among_five.confidence == pytest.approx(0.99)
    # t(0.995, 2) / t(0.975, 2) = 9.924843 / 4.302653
    ratio = among_five.interval.half_width / alone.interval.half_width
    assert ratio == pytest.approx(9.924843 / 4.302653, rel=1e-6)


def test_one_seed_or_none_decides_nothing():
    assert not paired_difference({0: 9.0}, {0: 1.0}).decided
    nothing = paired_difference({0: 9.0}, {1: 1.0})
    assert (nothing.n, nothing.mean, nothing.decided) == (0, None, False)
    assert seeds_needed(nothing) is None


@pytest.mark.parametrize(
    ("effect", "seeds"),
    # Sample sizes of the two-sided paired t test at α = 0.05, power 0.8 (Cohen 1988 and G*Power:
    # 34 for d = 0.5, 15 for 0.8, 10 for 1.0; 199 for 0.2).
    [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)],
)
def test_seeds_needed_are_the_tables(effect, seeds):
    difference = Difference(n=3, mean=effect, std=1.0, interval=None, confidence=0.95)
    assert seeds_needed(difference) == pytest.approx(seeds, abs=1)


def test_no_number_of_seeds_decides_a_difference_of_zero():
    assert seeds_needed(paired_difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0})) is None


def half_widths(samples, confidence=0.95):
    """t intervals of many samples at once: the arithmetic of `summarize`, over rows."""
    n = samples.shape[1]
    factor = t_quantile((1 + confidence) / 2, n - 1) / n**0.5
    return factor * samples.std(axis=1, ddof=1)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_the_truth_as_often_as_they_say(n):
    samples = np.random.default_rng(0).normal(7.0, 2.0, (20_000, n))
    first = summarize(samples[0])
    assert half_widths(samples)[0] == pytest.approx(first.interval.half_width)
    covered = np.abs(samples.mean(axis=1) - 7.0) <= half_widths(samples)
    assert covered.mean() == pytest.approx(0.95, abs=0.005)  # 0.0015 is one standard error


@pytest.mark.parametrize("n", [3, 5])
def test_equals_are_declared_different_no_more_often_than_stated(n):
    """Six equal normalizers, the other five each against one, 4,000 times over."""
    draw = np.random.default_rng(1)
    seed_effect = draw.normal(size=(4000, 1, n))
    scores = 95 + seed_effect + 0.3 * draw.normal(size=(4000, 6, n))
    wrong = plain = 0
    for table in scores:
        series = [dict(enumerate(row)) for row in table]
        corrected = [paired_difference(row, series[0], comparisons=5) for row in series[1:]]
        wrong += any(difference.decided for difference in corrected)
        differences = table[1:] - table[0]
        plain += bool((np.abs(differences.mean(1)) > half_widths(differences)).any())
    assert wrong / 4000 <= 0.05 + 0.01
    assert plain / 4000 > 0.10  # without the correction it would be more often than stated


def test_the_stated_power_is_about_what_the_seeds_buy():
    """With as many seeds as asked for, 80% of experiments decide."""
    difference = Difference(n=3, mean=0.8, std=1.0, interval=None, confidence=0.95)
    n = seeds_needed(difference)
    samples = np.random.default_rng(2).normal(0.8, 1.0, (20_000, n))
    decided = np.abs(samples.mean(axis=1)) > half_widths(samples)
    assert decided.mean() == pytest.approx(0.8, abs=0.03)

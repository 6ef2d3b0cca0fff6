"""Mean, standard deviation and t interval against values computed by hand."""

import re

import pytest

from normlab.report.notes import reading
from normlab.report.rows import load
from normlab.report.statistics import summarize, t_quantile


def test_three_values():
    summary = summarize([1.0, 2.0, 3.0])
    assert (summary.n, summary.mean, summary.std) == (3, 2.0, 1.0)
    # t(0.975, 2) * 1 / sqrt(3) = 4.302653 / 1.732051
    assert summary.half_width == pytest.approx(2.484138, abs=1e-6)


def test_eight_values():
    summary = summarize([2, 4, 4, 4, 5, 5, 7, 9])
    assert summary.mean == 5.0
    # Squared deviations: 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, over n - 1 = 7.
    assert summary.std == pytest.approx((32 / 7) ** 0.5)
    # t(0.975, 7) = 2.364624; 2.364624 * 2.138090 / sqrt(8)
    assert summary.half_width == pytest.approx(1.787488, abs=1e-5)


def test_quantile_of_two_degrees_of_freedom_has_a_closed_form():
    # t(p, 2) = (2p - 1) / sqrt(2 p (1 - p)) = 0.95 / sqrt(0.04875)
    assert t_quantile(0.975, 2) == pytest.approx(0.95 / 0.04875**0.5, rel=1e-9)
    assert t_quantile(0.975, 2) == pytest.approx(4.302653, abs=1e-6)


def test_many_degrees_of_freedom_approach_the_normal_distribution():
    assert t_quantile(0.975, 10**7) == pytest.approx(1.959964, abs=1e-6)


def test_one_value_has_no_interval():
    summary = summarize([0.5])
    assert (summary.n, summary.mean, summary.std, summary.half_width) == (1, 0.5, None, None)


def test_no_value_has_no_mean():
    assert summarize([]).mean is None


def test_equal_values_have_an_interval_of_width_zero():
    assert summarize([0.25, 0.25, 0.25]).half_width == 0.0


def test_the_page_tells_the_true_width_of_intervals(make_sweep, tmp_path):
    text = " ".join(reading(load(make_sweep(tmp_path))))
    told = re.search(
        r"([\d.]+) standard deviations to each side for 3 seeds, ([\d.]+) for 5, ([\d.]+) for 10",
        text,
    )
    assert told
    widths = [f"{t_quantile(0.975, n - 1) / n**0.5:.2f}" for n in (3, 5, 10)]
    assert list(told.groups()) == widths

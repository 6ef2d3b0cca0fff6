"""Verdicts: hypotheses about two cells, and the claim they make up."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from normlab.report import write
from normlab.report.document import markdown
from normlab.report.page import html
from normlab.report.row import digest
from normlab.report.rows import load
from normlab.report.statistics import t_quantile
from normlab.report.verdict import Verdict, above, all_of, as_json, close, judge

NORMS = ("batch_norm", "layer_norm", "none")


@pytest.fixture
def sweep(make_sweep, tmp_path):
    """Returns a sweep of three normalizers with accuracies by seed."""

    def make(**accuracies):
        def run(setting, norm, seed):
            return {"accuracy": accuracies[norm][seed]}

        norms = tuple(accuracies)
        seeds = tuple(range(len(accuracies[norms[0]])))
        return load(make_sweep(tmp_path, settings={"base": {}}, norms=norms, seeds=seeds, run=run))

    return make


FAR = {"batch_norm": (0.92, 0.941, 0.962), "layer_norm": (0.90, 0.92, 0.94)}  # +2.10 ± 0.25


def test_a_claim_whose_hypotheses_all_hold_is_reproduced(sweep):
    verdict = judge(all_of(above("batch_norm", "layer_norm")), sweep(**FAR))
    assert verdict.outcome == "reproduced"
    assert verdict.sentences == (
        "batch_norm above layer_norm: holds (+2.10 ± 0.25 points, 3 seeds).",
    )


def test_one_contradicted_hypothesis_decides_against_the_claim(sweep):
    claim = all_of(above("batch_norm", "layer_norm"), above("layer_norm", "batch_norm"))
    verdict = judge(claim, sweep(**FAR))
    assert verdict.outcome == "not reproduced"
    assert "contradicted" in verdict.sentences[1]


def test_too_few_seeds_are_underpowered_and_told_how_many_it_would_take(sweep):
    rows = sweep(batch_norm=(0.90, 0.91, 0.92), layer_norm=(0.90, 0.90, 0.90))
    verdict = judge(all_of(above("batch_norm", "layer_norm")), rows)
    assert verdict.outcome == "underpowered"
    # d = 1: ten seeds for 80% power (Cohen 1988).
    assert "+1.00 ± 2.48 points, 3 seeds; about 10 in all" in verdict.sentences[0]
    one = judge(
        all_of(above("batch_norm", "layer_norm")), sweep(**{k: v[:1] for k, v in FAR.items()})
    )
    assert one.outcome == "underpowered"


def test_a_margin_is_part_of_the_hypothesis(sweep):
    # 2.10 ± 0.25 is above 1.8 for sure, below 3 for sure, and undecided at 2.
    rows = sweep(**FAR)
    answers = {
        margin: judge(all_of(above("batch_norm", "layer_norm", margin)), rows).outcome
        for margin in (1.8, 2.0, 3.0)
    }
    assert answers == {1.8: "reproduced", 2.0: "underpowered", 3.0: "not reproduced"}


def test_equality_is_shown_and_not_assumed_from_a_wide_interval(sweep):
    rows = sweep(**FAR)
    answers = {
        margin: judge(all_of(close("batch_norm", "layer_norm", margin)), rows).outcome
        for margin in (3.0, 2.0, 1.0)
    }
    assert answers == {3.0: "reproduced", 2.0: "underpowered", 1.0: "not reproduced"}


def test_more_hypotheses_ask_for_more(sweep):
    # Differences 1, 2, 3: mean 2, s = 1; half-width 2.48 alone; 0.1% short of holding either way.
    rows = sweep(batch_norm=(0.911, 0.912, 0.914), layer_norm=(0.90, 0.90, 0.90), none=(0.1,) * 3)
    hypothesis = above("batch_norm", "layer_norm", 0.8)
    # 1.23 ± 0.38 alone; t(1 - .05/20, 2)/t(.975, 2) = 14.089/4.303 widens it to 1.24 among ten.
    assert judge(all_of(hypothesis), rows).outcome == "reproduced"
    others = [above("batch_norm", "none")] * 9
    assert judge(all_of(hypothesis, *others), rows).outcome == "underpowered"


def test_any_measure_of_a_row_can_be_compared(sweep):
    def wrong(row):
        return 100 - 100 * row.number("test_accuracy")

    claim = all_of(above("layer_norm", "batch_norm", measure=wrong, what="error", unit="%"))
    verdict = judge(claim, sweep(**FAR))
    assert verdict.sentences == (
        "error of layer_norm above batch_norm: holds (+2.10 ± 0.25 %, 3 seeds).",
    )


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (lambda sweep: 1 / 0, "ZeroDivisionError: division by zero"),
        (all_of(above("batch_norm", "nothing")), "no 'nothing' in setting 'base'"),
        (lambda sweep: Verdict("perhaps", (), ""), "outcome 'perhaps' is none of reproduced"),
        (lambda sweep: Verdict(["reproduced"], (), ""), "outcome ['reproduced'] is none of"),
        (lambda sweep: SimpleNamespace(outcome="reproduced"), "which is no Verdict"),
        (lambda sweep: "reproduced", "it returned 'reproduced', which is no Verdict"),
        (lambda sweep: Verdict("reproduced", (np.array([1.0]),), ""), "sentence array([1.])"),
        (lambda sweep: Verdict("reproduced", "all good", ""), "sentences 'all good' are no tuple"),
        (lambda sweep: Verdict("reproduced", (), None), "test None is no text"),
        (lambda sweep: sys.exit("enough"), "SystemExit: enough"),
    ],
)
def test_a_verdict_that_fails_is_a_mark_and_no_crash(sweep, tmp_path, verdict, message):
    rows = sweep(**FAR)
    found = judge(verdict, rows)
    assert found.outcome == "no verdict"
    assert message in found.sentences[0]
    json.dumps(as_json(found, rows))


EXPERIMENT = {
    "name": "<b>x</b>",
    "scale": "smoke",
    "claim": "BatchNorm wins.",
    "published": [
        {
            "metric": "test_error",
            "setting": "ImageNet",
            "source": "table 2",
            "sure": "read",
            "same_setting": True,
            "rows": {"batch_norm": {"": {"value": 7.6, "std": 0.2, "n": 5}}},
        }
    ],
}


@pytest.fixture
def experiment(sweep, tmp_path):
    def make(**changes):
        rows = sweep(**FAR)
        plan = json.loads((tmp_path / "sweep.json").read_text())
        (tmp_path / "sweep.json").write_text(
            json.dumps(plan | {"experiment": EXPERIMENT | changes})
        )
        found = judge(all_of(above("batch_norm", "layer_norm")), rows)
        (tmp_path / "verdict.json").write_text(json.dumps(as_json(found, rows)))
        return load(tmp_path)

    return make


def test_the_report_begins_with_claim_and_verdict(experiment):
    text = markdown(experiment())
    assert text.index("BatchNorm wins.") < text.index("**Reproduced.**") < text.index("## Test acc")
    assert '<section class="verdict reproduced"><h2>Reproduced.</h2>' in html(experiment())


def test_the_papers_number_stands_beside_ours(experiment):
    # The paper's error of 7.6% is an accuracy of 92.40; ours is (92 + 94.1 + 96.2)/3 = 94.10.
    line = next(x for x in markdown(experiment()).splitlines() if "std 0.2" in x)
    assert line == "| base | batch_norm | 92.40 std 0.2 n=5 | 94.10 ± 5.22 n=3 | +1.70 |"


def test_another_settings_number_is_not_subtracted(experiment):
    tables = [EXPERIMENT["published"][0] | {"same_setting": False}]
    text = markdown(experiment(published=tables))
    assert "94.10 ± 5.22 n=3 | – |" in text
    assert "Not this scale's setting" in text


def test_a_verdict_of_earlier_rows_says_so(experiment, tmp_path):
    before = experiment()
    assert "Reproduced." in markdown(before)
    result = before.rows[0].path / "result.json"
    result.write_text(result.read_text().replace('"test_loss": 0.1', '"test_loss": 0.2'))
    after = load(tmp_path)
    assert digest(after) != digest(before)
    assert "Reproduced (of earlier rows: run it again)." in markdown(after)


def test_a_sweep_without_a_verdict_yet_says_so(experiment, tmp_path):
    experiment()
    (tmp_path / "verdict.json").unlink()
    assert "No verdict yet." in markdown(load(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        {"experiment": 3},
        {"experiment": {"published": 3, "claim": None}},
        {"experiment": {"published": [{"rows": {"batch_norm": 3}}, 4, {"rows": []}]}},
        {"experiment": {"published": [{"rows": {"batch_norm": {"": {"value": "x"}}}}]}},
    ],
)
def test_damaged_facts_do_not_stop_a_report(experiment, tmp_path, damage):
    experiment()
    plan = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(plan | damage))
    (tmp_path / "verdict.json").write_text("[1")
    assert write(tmp_path).html.read_text().count("<script") == 1


def test_a_claim_of_nothing_is_refused():
    with pytest.raises(ValueError, match="names no hypothesis"):
        all_of()


def test_the_seeds_said_for_equivalence_give_the_power_that_is_said(sweep):
    """Differences of −1, 0 and 1 points: mean 0, s = 1. Both bounds must be excluded at once."""
    rows = sweep(batch_norm=(0.90, 0.91, 0.92), layer_norm=(0.91, 0.91, 0.91))
    verdict = judge(all_of(close("batch_norm", "layer_norm", 1.0)), rows)
    told = re.search(r"about (\d+) in all would decide", verdict.sentences[0])
    n, draw = int(told[1]), np.random.default_rng(0)
    found = draw.normal(0, 1, (20_000, n))
    half_width = t_quantile(0.975, n - 1) * found.std(axis=1, ddof=1) / n**0.5
    power = float((abs(found.mean(axis=1)) + half_width < 1).mean())
    assert 0.8 <= power < 0.9

"""Quantities: what an experiment measures besides accuracy, kept, shown, and tested."""

import json

import pytest

from normlab.report import write
from normlab.report.document import markdown
from normlab.report.notes import warnings
from normlab.report.page import html
from normlab.report.quantity import Quantity, as_json, from_json
from normlab.report.results import Line, overview, publish
from normlab.report.rows import load
from normlab.report.statistics import t_quantile
from normlab.report.tables import quantity_cell
from normlab.report.verdict import above, all_of, close, judge, measure
from normlab.report.verdict import as_json as verdict_json

GROWTH = {"batch_norm": (1.20, 1.21, 1.22), "none": (1.0, 1.0, 1.0)}
PUBLISHED = {
    "metric": "growth <a layer>",
    "setting": "theory",
    "same_setting": True,
    "rows": {"batch_norm": {"": {"value": 1.2112}}},
}


def growth(row):
    """Returns the last value of the line that each run of these tests logs."""
    series = row.series("gradients")
    return series["growth"][-1][1] if "growth" in series else None


@pytest.fixture
def sweep(make_sweep, tmp_path):
    folder = tmp_path / "runs"
    make_sweep(folder, settings={"base": {}}, norms=tuple(GROWTH))
    for row in load(folder).rows:
        lines = [
            {"step": 0, "split": "gradients", "growth": 7.0},
            {"step": 4, "split": "gradients", "growth": GROWTH[row.norm][row.seed]},
            {"step": 4, "split": "other", "growth": 8.0},
            {"step": 5, "split": "gradients", "growth": None},
        ]
        with (row.path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    plan = json.loads((folder / "sweep.json").read_text())
    facts = {"name": "a_claim", "scale": "smoke", "claim": "It grows.", "published": [PUBLISHED]}
    (folder / "sweep.json").write_text(json.dumps(plan | {"experiment": facts}))
    rows = load(folder)
    found = judge(all_of(close("batch_norm", 1.2112, 0.05, measure=growth)), rows)
    kept = verdict_json(found, rows, {"growth <a layer>": growth})
    (folder / "verdict.json").write_text(json.dumps(kept))
    return load(folder)


def test_a_series_is_the_numbers_of_one_split_by_step(sweep):
    [row, *_] = sweep.rows
    assert row.series("gradients") == {"growth": ((0, 7.0), (4, 1.20))}
    assert row.series("nothing") == {}


def test_a_quantity_is_kept_by_cell_and_seed_and_read_back(sweep):
    found = measure("growth", growth, sweep)
    assert found.values[("base", "batch_norm")] == {0: 1.20, 1: 1.21, 2: 1.22}
    assert from_json(json.loads(json.dumps(as_json(found)))) == found


@pytest.mark.parametrize("damaged", [None, 3, {}, {"cells": 3}, {"name": "x", "cells": "ab"}])
def test_what_is_no_quantity_is_none(damaged):
    assert from_json(damaged) is None


def test_a_damaged_value_is_left_out():
    pairs = [[0, 1.5], ["a", 2.0], [1, "b"], [2], 3, [3, float("nan")]]
    data = {"name": "x", "cells": [{"setting": "base", "norm": "none", "values": pairs}, 7]}
    assert from_json(data) == Quantity("x", {("base", "none"): {0: 1.5}})


def test_a_cell_is_the_mean_with_its_interval_to_four_digits(sweep):
    # Mean 1.21, s = 0.01: t(0.975, 2) · 0.01 / √3 = 4.3027 · 0.005774 = 0.0248.
    assert t_quantile(0.975, 2) * 0.01 / 3**0.5 == pytest.approx(0.0248, abs=5e-5)
    found = measure("growth", growth, sweep)
    assert str(quantity_cell(found, "base", "batch_norm", "t")) == "1.210 ± 0.025 n=3"
    assert str(quantity_cell(found, "base", "none", "t")) == "1.000 n=3"  # equal: no interval
    assert str(quantity_cell(found, "base", "layer_norm", "t")) == "–"


def test_the_papers_number_stands_beside_it_on_every_page(sweep):
    assert "| base | batch_norm | 1.2112 | 1.210 ± 0.025 n=3 | -0.0012 |" in markdown(sweep)
    page = html(sweep)
    assert "Growth &lt;a layer&gt;: mean over seeds" in page
    assert "1.2112" in page
    paths = write(sweep.directory, sweep)
    assert "1.210" in paths.latex.read_text()


def test_the_overview_has_the_quantities_in_place_of_accuracies(sweep, tmp_path):
    publish(sweep, tmp_path / "a_claim-smoke")
    text = overview([Line("a_claim", "smoke", "It grows.", "")], tmp_path)
    assert "growth &lt;a layer&gt;, batch_norm: 1.2112" in text
    assert "growth &lt;a layer&gt;, batch_norm: 1.210 ± 0.025 n=3" in text
    assert "90." not in text  # no accuracy


def test_a_hypothesis_may_be_about_a_number(sweep):
    def outcome(*hypotheses):
        return judge(all_of(*hypotheses), sweep)

    # The interval is 1.210 ± 0.0248.
    inside = outcome(close("batch_norm", 1.2112, 0.03, measure=growth, what="growth", unit=""))
    assert inside.outcome == "reproduced"
    assert inside.sentences == (
        "growth of batch_norm within 0.03 of 1.2112: holds (-0.0012 ± 0.0248, 3 seeds).",
    )
    assert outcome(close("batch_norm", 1.2112, 0.02, measure=growth)).outcome == "underpowered"
    assert outcome(close("batch_norm", 1.4669, 0.1, measure=growth)).outcome == "not reproduced"
    assert outcome(above("batch_norm", 1.1, measure=growth)).outcome == "reproduced"
    # The seeds of `none` are equal, and say nothing of the spread.
    assert outcome(close("none", 1.0, 0.1, measure=growth)).outcome == "underpowered"


def test_a_verdict_without_quantities_is_as_before(make_sweep, tmp_path):
    make_sweep(tmp_path, settings={"base": {}}, norms=("none", "batch_norm"))
    rows = load(tmp_path)
    found = judge(all_of(above("batch_norm", "none")), rows)
    assert verdict_json(found, rows)["quantities"] == []
    assert "Quantities" not in markdown(rows)


@pytest.mark.parametrize(
    ("of_row", "told"),
    [
        (lambda row: row.result["zzz"], "KeyError: 'zzz'"),
        (lambda row: float("nan"), "nan is no finite number"),
        (lambda row: "abc", "'abc' is no finite number"),
    ],
)
def test_a_quantity_that_fails_is_told_and_ends_no_sweep(sweep, of_row, told):
    def of_some(row):
        return of_row(row) if row.norm == "none" else 1.0

    rows = load(sweep.directory)
    found = judge(all_of(close("batch_norm", 1.2112, 0.05, measure=growth)), rows)
    kept = verdict_json(found, rows, {"growth <a layer>": of_some})
    (sweep.directory / "verdict.json").write_text(json.dumps(kept, allow_nan=False))
    again = load(sweep.directory)
    assert set(again.claim.quantities[0].values) == {("base", "batch_norm")}
    assert f"growth <a layer> could not be measured on some run: {told}." in warnings(again)

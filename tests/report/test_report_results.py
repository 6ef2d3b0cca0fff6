"""Results that are kept: rows as JSON, figures, pages, and the overview made from them."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from normlab.errors import UserError
from normlab.report.notes import warnings
from normlab.report.published import beside
from normlab.report.results import Line, outcome, overview, publish
from normlab.report.rows import load
from normlab.report.verdict import above, all_of, as_json, judge

EXPERIMENT = {
    "name": "a_claim",
    "scale": "smoke",
    "claim": "BatchNorm wins | always.",
    "published": [
        {
            "metric": "test_accuracy",
            "setting": "ImageNet",
            "same_setting": False,
            "rows": {"batch_norm": {"": {"value": 76.4}}},
        }
    ],
}


@pytest.fixture
def sweep(make_sweep, tmp_path):
    def run(setting, norm, seed):
        start, rise = {"batch_norm": (0.92, 0.011), "layer_norm": (0.90, 0.010)}[norm]
        accuracy = start + rise * seed
        return {"accuracy": accuracy, "manifest": {"started": "2026-11-21T12:00:00+00:00"}}

    folder = tmp_path / "runs"
    norms = ("batch_norm", "layer_norm")
    make_sweep(folder, settings={"base": {}}, norms=norms, run=run)
    plan = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(plan | {"experiment": EXPERIMENT}))
    rows = load(folder)
    found = as_json(judge(all_of(above("batch_norm", "layer_norm")), rows), rows)
    (folder / "verdict.json").write_text(json.dumps(found))
    return load(folder)


def test_rows_figures_and_pages_are_written_and_the_same_again(sweep, tmp_path):
    paths = publish(sweep, tmp_path / "kept")
    names = {path.name for path in paths}
    assert {
        "rows.json",
        "rows.csv",
        "report.md",
        "report.html",
        "curves-0.svg",
        "curves-0.pdf",
    } <= names
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in publish(sweep, tmp_path / "kept")] == before
    # No link leads to a run's folder, which is not kept.
    page = (tmp_path / "kept" / "report.html").read_text()
    assert all(f'href="{row.id}/"' not in page for row in sweep.rows)


def test_figures_stand_alone(sweep, tmp_path):
    publish(sweep, tmp_path)
    text = (tmp_path / "curves-0.svg").read_text()
    assert ElementTree.fromstring(text.encode()).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--" not in text


def test_every_row_is_in_the_json(sweep, tmp_path):
    publish(sweep, tmp_path)
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["outcome"] == "reproduced"
    assert kept["interval"] == "t"
    assert len(kept["rows"]) == 6
    assert kept["rows"][0]["result"]["test_accuracy"] == sweep.rows[0].number("test_accuracy")
    assert kept["provenance"]["git commit"] == {"000000000000": 6}


def test_the_overview_says_what_the_results_say(sweep, tmp_path):
    publish(sweep, tmp_path / "a_claim-smoke")
    lines = [Line("a_claim", scale, EXPERIMENT["claim"], "a minute") for scale in ("smoke", "cpu")]
    smoke, cpu = overview(lines, tmp_path).splitlines()[-2:]
    assert smoke.startswith("| BatchNorm wins \\| always. | `normlab paper a_claim --scale=smoke`")
    assert "batch_norm 76.4 (another setting)" in smoke
    # (92.0 + 93.0 + 94.0) / 3
    assert "batch_norm 93.10 ± 2.73 n=3" in smoke
    assert "[reproduced](results/a_claim-smoke/report.md), 2026-11-21, commit 0000000" in smoke
    assert "not run here" in cpu
    assert (outcome(tmp_path, "a_claim", "smoke"), outcome(tmp_path, "a_claim", "cpu")) == (
        "reproduced",
        "",
    )


def test_a_verdict_of_other_rows_is_not_kept(sweep, tmp_path):
    (sweep.rows[0].path / "result.json").write_text('{"test_accuracy": 0.5}')
    with pytest.raises(UserError, match="no experiment with a verdict of its rows"):
        publish(load(sweep.directory), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_damaged_result_is_named(sweep, tmp_path):
    (tmp_path / "a_claim-smoke").mkdir()
    (tmp_path / "a_claim-smoke" / "rows.json").write_text("{")
    with pytest.raises(UserError, match=r"rows\.json' holds no results"):
        outcome(tmp_path, "a_claim", "smoke")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"numbers": 3}, "'numbers' is 3"),
        ({"numbers": [{"norm": "none"}]}, "numbers: 'setting' is missing"),
        ({"rows": [7]}, "rows: 7 is no object"),
        ({"rows": [{"id": "x", "started": None}]}, "rows: 'started' is None"),
        ({"provenance": {"git commit": "abc"}}, "provenance: 'git commit' is 'abc'"),
        ({"outcome": None}, "'outcome' is None"),
    ],
)
def test_a_result_damaged_inside_is_one_line(sweep, tmp_path, damage, message):
    publish(sweep, tmp_path / "a_claim-smoke")
    path = tmp_path / "a_claim-smoke" / "rows.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError, match=message) as caught:
        overview([Line("a_claim", "smoke", "", "")], tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_verdict_whose_code_failed_replaces_no_kept_one(sweep, tmp_path):
    def broken(outcome):
        return replace(sweep, claim=replace(sweep.claim, outcome=outcome))

    publish(broken("no verdict"), tmp_path / "kept")  # there is nothing to lose yet
    publish(sweep, tmp_path / "kept")
    before = (tmp_path / "kept" / "rows.json").read_bytes()
    with pytest.raises(UserError, match="keeps the verdict 'reproduced', and this one's code fail"):
        publish(broken("no verdict"), tmp_path / "kept")
    assert (tmp_path / "kept" / "rows.json").read_bytes() == before


def test_the_overview_tells_changes_days_and_versions_of_jax(sweep, tmp_path):
    publish(sweep, tmp_path / "a_claim-smoke")
    path = tmp_path / "a_claim-smoke" / "rows.json"
    kept = json.loads(path.read_text())
    kept["rows"][0]["started"] = "2026-11-20T23:59:00+00:00"
    kept["provenance"]["git commit"] = {"1234567890ab with uncommitted changes": 6}
    kept["provenance"]["jax"] = {"0.11.0": 3, "0.10.2": 3}
    path.write_text(json.dumps(kept))
    last = overview([Line("a_claim", "smoke", "", "")], tmp_path).splitlines()[-1]
    assert last.endswith(
        ", 2026-11-20 to 2026-11-21, commit 1234567 with uncommitted changes, jax 0.10.2, 0.11.0 |"
    )


def test_a_command_names_what_must_be_filled_in(tmp_path):
    line = Line("a_claim", "cpu", "", "", "--config.data.path=PATH")
    text = overview([line], tmp_path)
    assert "`normlab paper a_claim --scale=cpu --config.data.path=PATH`" in text


def test_results_of_other_runs_are_not_replaced(sweep, tmp_path):
    publish(sweep, tmp_path / "kept")
    path = tmp_path / "kept" / "rows.json"
    kept = json.loads(path.read_text())
    kept["rows"][0]["id"] = "another"
    path.write_text(json.dumps(kept))
    before = path.read_bytes()
    with pytest.raises(UserError, match="keeps the results of other runs"):
        publish(sweep, tmp_path / "kept")
    assert path.read_bytes() == before


def test_a_trial_with_overrides_is_not_the_scale_as_declared(sweep, tmp_path):
    folder = tmp_path / "runs"
    plan = json.loads((folder / "sweep.json").read_text())
    assert warnings(sweep) == []
    plan["experiment"]["published"][0]["same_setting"] = True
    for overrides, subtracted in (({"data.path": "x"}, True), ({"train.num_epochs": 0.02}, False)):
        plan["overrides"] = overrides
        (folder / "sweep.json").write_text(json.dumps(plan))
        found = load(folder)
        [row] = beside(found, found.claim.published[0]).rows
        assert (row[-1].text == "+16.70") == subtracted  # 93.1 − 76.4
        told = "Not the scale as declared: the command line set train.num_epochs=0.02."
        assert (told in warnings(found)) == (not subtracted)


def test_a_published_value_stands_beside_the_field_that_it_is_of(make_sweep, tmp_path):
    """Groups {2, 8} × batch {32, 2}: a row {2: ...} could be of either, so it is of neither."""
    names = [f"num_groups={g}, batch_size={b}" for g in (2, 8) for b in (32, 2)]
    make_sweep(tmp_path, settings={name: {} for name in names}, norms=("group_norm",))
    plan = json.loads((tmp_path / "sweep.json").read_text())
    for entry in plan["runs"]:
        groups, size = (x.partition("=")[2] for x in entry["labels"]["setting"].split(", "))
        entry["labels"] |= {"norm.num_groups": int(groups), "train.batch_size": int(size)}
    rows = {"group_norm": {"2": {"value": 65.0}, "num_groups=8, batch_size=2": {"value": 70.0}}}
    table = {"metric": "test_accuracy", "setting": "x", "same_setting": True, "rows": rows}
    plan["experiment"] = EXPERIMENT | {"published": [table]}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    sweep = load(tmp_path)
    found = {row[0].text: row[2].text for row in beside(sweep, sweep.claim.published[0]).rows}
    assert found == {"num_groups=8, batch_size=2": "70.00"}


def test_the_overview_shows_the_overrides_of_a_kept_trial(sweep, tmp_path):
    plan = json.loads((tmp_path / "runs/sweep.json").read_text())
    plan["overrides"] = {"train.num_epochs": 0.02, "data.path": "elsewhere"}
    (tmp_path / "runs/sweep.json").write_text(json.dumps(plan))
    publish(load(tmp_path / "runs"), tmp_path / "results/a_claim-smoke")
    text = overview([Line("a_claim", "smoke", "c", "a minute")], tmp_path / "results")
    command = "normlab paper a_claim --scale=smoke --config.train.num_epochs=0.02"
    assert f"`{command}` (a minute)" in text

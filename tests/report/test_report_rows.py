"""From folders to rows: states, sharing, and files that are missing, cut off or foreign."""

import json
import shutil

import pytest

from normlab.errors import UserError
from normlab.report import write
from normlab.report.notes import provenance, warnings
from normlab.report.rows import load

ONE = {"settings": {"base": {}}, "norms": ("batch_norm",)}


def test_a_sweep_keeps_the_order_of_its_plan(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, norms=("none", "batch_norm"), seeds=(2, 0)))
    assert sweep.norms == ("none", "batch_norm")
    assert list(sweep.settings) == ["base", "lr x5", "ghost 1"]
    assert sweep.settings["lr x5"] == {"optim.base_lr": 0.5}
    assert [row.seed for row in sweep.cell("base", "none")] == [2, 0]
    assert sweep.title == "configs/digits.py"


def test_a_shared_run_counts_once_in_each_setting(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, norms=("none", "batch_norm")))
    # 2 normalizers x 3 settings x 3 seeds = 18 entries; `none` shares 3 runs: 15 folders.
    assert len(sweep.rows) == 18
    assert len(sweep.runs()) == 15
    base, ghost = sweep.cell("base", "none"), sweep.cell("ghost 1", "none")
    assert [row.id for row in base] == [row.id for row in ghost]
    assert {row.shared_with for row in base} == {""}
    assert {row.shared_with for row in ghost} == {"base"}
    assert {row.shared_with for row in sweep.cell("ghost 1", "batch_norm")} == {""}


def test_the_same_run_planned_twice_in_a_cell_is_one_measurement(make_sweep, tmp_path):
    make_sweep(tmp_path, **ONE)
    plan = json.loads((tmp_path / "sweep.json").read_text())
    plan["runs"] *= 2
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert len(load(tmp_path).rows) == 3


def test_states(make_sweep, tmp_path):
    states = ["done", "diverged", "failed", "interrupted", "running", None]
    sweep = load(
        make_sweep(
            tmp_path,
            **ONE,
            seeds=tuple(range(6)),
            run=lambda setting, norm, seed: states[seed] and {"state": states[seed]},
        )
    )
    assert [row.state for row in sweep.rows] == [*states[:-1], "planned"]
    assert not [note for row in sweep.rows for note in row.notes]


def test_running_without_a_living_process_is_interrupted(make_sweep, tmp_path):
    make_sweep(tmp_path, **ONE, run=lambda *_: {"state": "running"})
    assert {row.state for row in load(tmp_path).rows} == {"running"}
    living = load(tmp_path).rows[0].path
    states = [row.state for row in load(tmp_path, alive=lambda path: path == living).rows]
    assert states == ["running", "interrupted", "interrupted"]


@pytest.mark.parametrize("damaged", ["", "{", '{"status": "running"}'])
def test_a_run_with_a_result_is_finished_whatever_its_status_says(make_sweep, tmp_path, damaged):
    make_sweep(tmp_path, settings={"base": {}}, norms=("none",), seeds=(0,))
    folder = next(path.parent for path in tmp_path.glob("*/result.json"))
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"status": "diverged"}))
    (folder / "status.json").write_text(damaged)
    assert [row.state for row in load(tmp_path, alive=lambda path: False).rows] == ["diverged"]


def test_an_empty_folder_of_a_run_is_still_planned(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, **ONE, run=lambda *_: None))
    sweep.rows[0].path.mkdir()
    assert load(tmp_path).rows[0].state == "planned"


def test_a_cut_off_metrics_file_is_a_note_and_the_rest_is_read(make_sweep, tmp_path):
    row = load(make_sweep(tmp_path, **ONE)).rows[0]
    metrics = row.path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-15])
    cut = load(tmp_path).rows[0]
    assert cut.notes == ("metrics.jsonl: the last line is cut off",)
    assert cut.curve == row.curve[:-1]
    assert any("cut off" in warning and row.id in warning for warning in warnings(load(tmp_path)))


def test_unreadable_lines_inside_a_metrics_file_are_named(make_sweep, tmp_path):
    row = load(make_sweep(tmp_path, **ONE)).rows[0]
    metrics = row.path / "metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")
    lines[1], lines[4] = b"\xff\xfe\x00", b"[1, 2]"
    metrics.write_bytes(b"\n".join(lines))
    assert load(tmp_path).rows[0].notes == ("metrics.jsonl: 2 unreadable (line 2, 5)",)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"a": 1}x'])
@pytest.mark.parametrize("name", ["status", "result", "manifest", "config"])
def test_an_unreadable_file_is_a_note(make_sweep, tmp_path, name, content):
    row = load(make_sweep(tmp_path, **ONE)).rows[0]
    (row.path / f"{name}.json").write_text(content)
    assert load(tmp_path).rows[0].notes == (f"{name}.json is not a readable JSON object",)


@pytest.mark.parametrize("name", ["result.json", "manifest.json", "config.json", "metrics.jsonl"])
def test_a_missing_file_of_a_done_run_is_a_note(make_sweep, tmp_path, name):
    row = load(make_sweep(tmp_path, **ONE)).rows[0]
    (row.path / name).unlink()
    assert load(tmp_path).rows[0].notes == (f"{name} is missing",)


def test_numbers_that_are_not_finite_are_no_measurement(make_sweep, tmp_path):
    row = load(make_sweep(tmp_path, **ONE)).rows[0]
    text = '{"test_accuracy": null, "test_loss": NaN, "train_loss": 1e999, "steps": 1, "big": 1%s}'
    (row.path / "result.json").write_text(text % ("0" * 400))
    assert load(tmp_path).rows[0].result == {"steps": 1}


def test_steps_passed_over_are_told(make_sweep, tmp_path):
    row = load(make_sweep(tmp_path, **ONE)).rows[0]
    with (row.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 400, "split": "train", "nonfinite": 3}\n')
        file.write('{"step": 422, "split": "train", "nonfinite": 4}\n')
        # The line of a resumed run, written again, counts once.
        file.write('{"step": 422, "split": "train", "nonfinite": 4}\n')
    [note] = load(tmp_path).rows[0].notes
    assert note == "7 steps passed over because something was not finite"


def test_mixed_commits_and_versions_are_shown(make_sweep, tmp_path):
    odd = {"git_commit": "abc" * 14, "git_dirty": True, "versions": {"jax": "0.11.0"}}
    make_sweep(tmp_path, **ONE, run=lambda s, n, seed: {"manifest": odd} if seed == 1 else {})
    sweep = load(tmp_path)
    assert provenance(sweep)["git commit"] == {
        "000000000000": 2,
        "abcabcabcabc with uncommitted changes": 1,
    }
    assert provenance(sweep)["flax"] == {"0.12.8": 2, "not recorded": 1}
    assert "The runs differ in jax: 0.10.2 (2 runs), 0.11.0 (1 run)." in warnings(sweep)


def test_a_clean_sweep_has_no_caveats(make_sweep, tmp_path):
    assert warnings(load(make_sweep(tmp_path))) == []


def test_runs_that_no_plan_names_are_told(make_sweep, make_run, tmp_path):
    make_sweep(tmp_path, **ONE)
    make_run(tmp_path / "stranger")
    sweep = load(tmp_path)
    assert len(sweep.rows) == 3
    assert "stranger" in sweep.notes[0]


def test_an_id_cannot_point_out_of_the_sweep(make_sweep, make_run, tmp_path):
    make_run(tmp_path / "secret")
    directory = make_sweep(tmp_path / "sweep", **ONE)
    plan = json.loads((directory / "sweep.json").read_text())
    plan["runs"][0]["id"] = "../secret"
    plan["runs"][1] = "no object"
    (directory / "sweep.json").write_text(json.dumps(plan))
    sweep = load(directory)
    assert len(sweep.rows) == 1
    assert "../secret" in sweep.notes[0]
    assert "run 2" in sweep.notes[1]


def test_an_unreadable_plan_leaves_the_folders_found(make_sweep, tmp_path):
    make_sweep(tmp_path, **ONE)
    (tmp_path / "sweep.json").write_text('{"runs": [')
    sweep = load(tmp_path)
    assert [row.seed for row in sweep.rows] == [0, 1, 2]
    assert "not a readable JSON object" in sweep.notes[0]
    assert "not all planned" in sweep.notes[1]


def test_a_single_run_folder(make_run, tmp_path):
    sweep = load(make_run(tmp_path / "gn8", norm="group_norm", seed=3))
    [row] = sweep.rows
    assert (row.setting, row.norm, row.seed, row.id) == ("base", "group_norm", 3, "gn8")


def test_a_folder_of_runs_is_labelled_by_what_differs(make_run, tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"a{seed}", norm="none", seed=seed)
        make_run(tmp_path / f"b{seed}", norm="batch_norm", seed=seed)
    make_run(tmp_path / "c", norm="none", overrides={"optim.base_lr": 0.5})
    # A field of one normalizer is compared among runs of that normalizer alone.
    make_run(tmp_path / "d", norm="batch_norm", seed=2, overrides={"norm.momentum": 0.9})
    sweep = load(tmp_path)
    assert list(sweep.settings) == ["base", "optim.base_lr=0.5"]
    assert [row.seed for row in sweep.cell("base", "batch_norm")] == [0, 1, 2]
    assert [row.id for row in sweep.cell("optim.base_lr=0.5", "none")] == ["c"]


def test_a_copied_run_folder_is_no_further_seed(make_run, tmp_path):
    make_run(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    sweep = load(tmp_path)
    assert len(sweep.rows) == 1
    assert sweep.notes == ("two holds the same run as one, left out",)


def test_nothing_to_report_on_is_one_line(make_sweep, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no run$"):
        load(tmp_path)
    make_sweep(tmp_path / "demo", **ONE)
    with pytest.raises(UserError, match=r"holds no run; did you mean '.*demo'\?$"):
        load(tmp_path)
    (tmp_path / "sweep.json").write_text('{"runs": []}')
    with pytest.raises(UserError, match="plans no run"):
        load(tmp_path)
    (tmp_path / "sweep.json").write_text('{"runs": [{"id": "../x", "labels": {}}, 3]}')
    with pytest.raises(UserError, match=r"plans no run: .* run 1 has the id '\.\./x', left out"):
        load(tmp_path)


def _other_versions(row):
    path = row.path / "manifest.json"
    manifest = json.loads(path.read_text())
    versions = {"git_commit": "abc" * 14, "versions": {"jax": "0.11.0", "flax": "0.12.8"}}
    path.write_text(json.dumps(manifest | versions))


def _cut_off(row):
    path = row.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-15])


def _metrics_of_a_folder(row):
    (row.path / "metrics.jsonl").unlink()
    (row.path / "metrics.jsonl").mkdir()


@pytest.mark.parametrize(
    ("damage", "marks"),
    [
        (
            _other_versions,
            ["git commit: abcabcabcabc (1 run), 000000000000 (2 runs)", "jax: 0.11.0 (1 run)"],
        ),
        (_cut_off, ["metrics.jsonl: the last line is cut off"]),
        (_metrics_of_a_folder, ["metrics.jsonl cannot be read: Is a directory"]),
        (lambda row: (row.path / "manifest.json").unlink(), ["manifest.json is missing"]),
        (lambda row: shutil.rmtree(row.path), ["1/3 planned", "1 of 3 runs without a result"]),
        (lambda row: (row.path / "status.json").write_text("{}"), ["1/3 interrupted"]),
    ],
    ids=["versions", "cut off", "folder", "manifest", "gone", "status"],
)
def test_what_is_wrong_with_a_run_is_seen_on_every_page(make_sweep, tmp_path, damage, marks):
    damage(load(make_sweep(tmp_path, **ONE)).rows[0])
    paths = write(tmp_path)
    page, text = paths.html.read_text(), paths.markdown.read_text()
    for mark in marks:
        assert mark in page
        assert mark in text


def test_a_run_resumed_elsewhere_says_so(make_run, tmp_path):
    resumed = [{"git_commit": "f" * 40, "versions": {"jax": "0.4.0"}}, "damaged"]
    make_run(tmp_path / "a", manifest={"resumed": resumed})
    [row] = load(tmp_path).rows
    assert row.notes == (
        f"resumed under another git commit: {'f' * 12}, begun under {'0' * 12}",
        "resumed under another jax: 0.4.0, begun under 0.10.2",
    )
    assert any("resumed under another jax" in note for note in warnings(load(tmp_path)))


def test_an_accuracy_that_is_no_fraction_is_left_out(make_run, tmp_path):
    folder = make_run(tmp_path / "a")
    result = json.loads((folder / "result.json").read_text()) | {"test_accuracy": 93.5}
    (folder / "result.json").write_text(json.dumps(result))
    [row] = load(tmp_path).rows
    assert row.number("test_accuracy") is None
    assert row.notes == ("result.json: test_accuracy = 93.5 is not from 0 to 1, left out",)

"""Plans and pools: shared runs, nothing run twice, nothing lost to a crash."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from normlab import grid, pool, run, sweep
from normlab.errors import UserError

TINY = {
    "model.widths": "(4,)",
    "model.strides": "(2,)",
    "train.num_steps": "4",
    "eval.every_steps": "4",
    "log.every_steps": "2",
    "checkpoint.every_steps": "2",
}
GHOST = {"batch_stats.scope": "ghost", "batch_stats.ghost_size": "1"}


def plan_of(norms=("none", "batch_norm"), settings=None, seeds=(0,), **overrides):
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    varied = grid.settings(settings or {"base": {}}) * grid.grid({"norm": norms})
    return sweep.make_plan("configs/digits.py", varied, seeds=seeds, overrides=TINY | names)


def execute(plan, folder, jobs=2):
    sweep.write_plan(plan, folder)
    events = []
    states = pool.run_plan(plan, folder, jobs, 1, events.append)
    return states, events


def test_a_stateless_normalizer_shares_its_run_between_scopes():
    plan = plan_of(settings={"base": {}, "ghost": GHOST}, seeds=(0, 1))
    assert len(plan.runs) == 2 * 2 * 2
    ids = {(p.labels["setting"], p.labels["norm"], p.labels["seed"]): p.id for p in plan.runs}
    assert ids["base", "none", 0] == ids["ghost", "none", 0]
    assert ids["base", "batch_norm", 0] != ids["ghost", "batch_norm", 0]
    assert len(set(ids.values())) == 6


def test_the_demo_has_42_runs():
    norms = ("none", "batch_norm", "layer_norm", "group_norm", "instance_norm", "batch_renorm")
    settings = {"lr 0.1": {}, "lr 0.5": {"optim.base_lr": "0.5"}, "batch of 1": GHOST}
    varied = grid.settings(settings) * grid.grid({"norm": norms})
    plan = sweep.make_plan("configs/digits.py", varied, seeds=range(3), overrides={})
    # 6 norms · 2 rates · 3 seeds = 36, and the two with state once more: 2 · 3 = 6.
    assert len({planned.id for planned in plan.runs}) == 42


def test_a_field_that_only_some_normalizers_have_goes_to_those():
    plan = plan_of(norms=("none", "group_norm"), norm__num_groups="4")
    by_norm = {planned.labels["norm"]: planned.overrides for planned in plan.runs}
    assert "norm.num_groups" in by_norm["group_norm"]
    assert "norm.num_groups" not in by_norm["none"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"norms": ("bach_norm",)}, "did you mean 'batch_norm'"),
        ({"norms": ()}, "gives 'norm' no value"),
        ({"settings": {"a": {"optim.lr": "1"}}}, "unknown config field 'optim.lr'"),
        ({"settings": {"a": {**GHOST, "batch_stats.ghost_size": "48"}}}, "does not divide"),
    ],
)
def test_a_mistake_anywhere_in_a_plan_is_found_before_the_first_run(change, expected):
    with pytest.raises(UserError, match=expected):
        plan_of(**change)


def test_a_sweep_runs_all_and_then_nothing(tmp_path):
    plan = plan_of()
    states, events = execute(plan, tmp_path)
    assert set(states.values()) == {"done"}
    ended = [event for event in events if event.ended]
    assert [(e.finished, e.total) for e in ended] == [(1, 2), (2, 2)]
    assert events[-1].fraction == 1.0
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["id"] for entry in written["runs"]] == [planned.id for planned in plan.runs]
    again, events = execute(plan, tmp_path)
    assert (again, events) == (states, [])


def test_a_damaged_status_of_a_finished_run_is_written_again(tmp_path):
    plan = plan_of(norms=("none",))
    execute(plan, tmp_path)
    path = tmp_path / plan.runs[0].id / "status.json"
    before = path.read_bytes()
    path.write_text("{")
    states, events = execute(plan, tmp_path)
    assert (set(states.values()), events) == ({"done"}, [])
    assert path.read_bytes() == before


def test_a_larger_plan_adds_only_what_is_new(tmp_path):
    execute(plan_of(norms=("none",)), tmp_path)
    states, events = execute(plan_of(norms=("none", "layer_norm")), tmp_path)
    assert len(states) == 2
    assert [event.label for event in events if event.ended] == ["base · layer_norm · seed 0"]
    execute(plan_of(norms=("none",)), tmp_path)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["norms"] == ["none", "layer_norm"]  # a smaller plan forgets nothing


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [
        ({}, {"train__num_steps": "5"}, r"override train\.num_steps = 4, not 5"),
        (
            {"settings": {"a": {"optim.base_lr": "0.01"}}},
            {"settings": {"a": {"optim.base_lr": "1.0"}}, "norms": ("layer_norm",)},
            r"setting 'a': optim\.base_lr = 0.01, not 1.0",
        ),
        (
            {"settings": {"a": {}}},
            {"settings": {"a": {"optim.base_lr": "1.0"}}},
            r"setting 'a': optim\.base_lr = its default, not 1.0",
        ),
    ],
)
def test_one_name_stands_for_one_thing_in_a_folder(tmp_path, there, here, expected):
    """Otherwise two experiments would meet under one heading of a table."""
    sweep.write_plan(plan_of(**there), tmp_path)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(UserError, match=expected):
        sweep.write_plan(plan_of(**here), tmp_path)
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_what_changes_no_result_may_differ(tmp_path):
    sweep.write_plan(plan_of(), tmp_path)
    sweep.write_plan(plan_of(checkpoint__every_steps="4"), tmp_path)


@pytest.mark.parametrize("change", [{"seed": "4"}, {"settings": {"a": {"seed": "4"}}}])
def test_seeds_come_from_seeds_alone(change):
    with pytest.raises(UserError, match="seed=4 is set; a sweep has the seeds of --seeds"):
        plan_of(**change)


def test_two_comparisons_do_not_write_one_folder(tmp_path):
    with (
        sweep.held(tmp_path),
        pytest.raises(UserError, match="being written by another process"),
        sweep.held(tmp_path),
    ):
        pass


@pytest.mark.parametrize("damaged", ["{}", '{"config": "configs/digits.py", "runs": 3}'])
def test_a_damaged_plan_is_refused_and_kept(tmp_path, damaged):
    (tmp_path / "sweep.json").write_text(damaged)
    with pytest.raises(UserError, match=r"sweep\.json is damaged"):
        sweep.write_plan(plan_of(), tmp_path)
    assert (tmp_path / "sweep.json").read_text() == damaged


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused = pytest.raises(UserError, match=r"no comparison's and holds 'notes\.txt'")
    with refused, sweep.held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_run_is_retried_and_the_others_go_on(tmp_path):
    plan = plan_of()
    victim = plan.runs[0].id
    (tmp_path / "sweep").mkdir()
    folder = tmp_path / "sweep"
    sweep.write_plan(plan, folder)
    (folder / victim).mkdir()
    (folder / victim / "stranger").write_text("in the way")
    states = pool.run_plan(plan, folder, 1, 1, lambda event: None)
    assert states == {plan.runs[0].id: "failed", plan.runs[1].id: "done"}
    assert (folder / victim / "stranger").read_text() == "in the way"
    (folder / victim / "stranger").unlink()
    states = pool.run_plan(plan, folder, 1, 1, lambda event: None)
    assert set(states.values()) == {"done"}


@pytest.mark.faults
def test_a_killed_worker_loses_nothing_but_its_own_unfinished_steps(tmp_path):
    plan = plan_of(
        norms=("none", "layer_norm"),
        train__num_steps="300",
        checkpoint__every_steps="50",
        eval__every_steps="50",
        log__every_steps="50",
    )
    sweep.write_plan(plan, tmp_path)
    killed = []

    def kill_once(event):
        if not killed and not event.ended and event.fraction > 0.2:
            killed.append(pid_of_worker())
            os.kill(killed[0], signal.SIGKILL)

    states = pool.run_plan(plan, tmp_path, 1, 1, kill_once)
    assert killed
    assert set(states.values()) == {"done"}
    resumed = [(tmp_path / run_id / "log.txt").read_text() for run_id in states]
    assert any("resumed at step" in text for text in resumed)
    # The same bytes as without a kill.
    other = tmp_path.with_name(tmp_path.name + "-whole")
    other.mkdir()
    sweep.write_plan(plan, other)
    pool.run_plan(plan, other, 1, 1, lambda event: None)
    for run_id in states:
        assert (tmp_path / run_id / "metrics.jsonl").read_bytes() == (
            other / run_id / "metrics.jsonl"
        ).read_bytes()


def pid_of_worker():
    """The worker process among this process's children."""
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in children.read_text().split():
            if b"normlab.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise AssertionError("no worker")


def test_runs_of_another_commit_can_be_redone_and_the_old_ones_are_kept(tmp_path):
    plan = plan_of(norms=("none",))
    execute(plan, tmp_path)
    folder = tmp_path / plan.runs[0].id
    manifest = run.read_json(folder / "manifest.json")
    run.write_json(folder / "manifest.json", manifest | {"git_commit": "0" * 40})
    sweep.write_plan(plan, tmp_path)
    assert folder.is_dir()  # reused unless asked
    sweep.write_plan(plan, tmp_path, redo_other_commits=True)
    assert not folder.exists()
    assert (tmp_path / f"{folder.name}.old-1" / "result.json").exists()


def test_a_folder_that_a_killed_process_had_just_begun_is_taken_over(tmp_path):
    for name in ("lock", ".sweep.json.4711"):
        (tmp_path / name).write_text("{")
    with sweep.held(tmp_path):
        sweep.write_plan(plan_of(norms=("none",)), tmp_path)
    assert (tmp_path / "sweep.json").exists()


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    refused = pytest.raises(UserError, match="cannot be written: File name too long")
    with refused, sweep.held(tmp_path / ("x" * 300)):
        pass


@pytest.mark.parametrize(
    ("value", "same"), [("[4]", True), ("4", True), ("(4,)", True), ("(4,4)", False)]
)
def test_a_value_in_other_words_is_the_same_value(tmp_path, value, same):
    sweep.write_plan(plan_of(norms=("none",)), tmp_path)
    other = {"model__widths": value} | ({} if same else {"model__strides": "(2,2)"})
    if same:
        sweep.write_plan(plan_of(norms=("none",), **other), tmp_path)
        return
    with pytest.raises(UserError, match=r"override model\.widths = \[4\], not \[4, 4\]"):
        sweep.write_plan(plan_of(norms=("none",), **other), tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": {"base": "x"}},
        {"norms": [[1]]},
        {"seeds": ["a"]},
        {"seeds": 3},
        {"runs": [{"id": 3, "labels": {}}]},
        {"runs": [7]},
        {"config": None},
    ],
)
def test_a_plan_damaged_inside_is_refused_and_kept(tmp_path, damage):
    plan = plan_of(norms=("none",))
    sweep.write_plan(plan, tmp_path)
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    before = path.read_bytes()
    with pytest.raises(UserError, match="is damaged"):
        sweep.write_plan(plan, tmp_path)
    assert path.read_bytes() == before


def test_a_fault_of_whoever_listens_ends_the_sweep_and_its_workers(tmp_path):
    """E.g. a closed pipe: it reaches the caller, and nothing goes on unseen."""
    plan = plan_of(seeds=range(4))
    sweep.write_plan(plan, tmp_path)

    def listener(event):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        pool.run_plan(plan, tmp_path, 2, 1, listener)
    assert not any(run.is_locked(folder) for folder in tmp_path.iterdir() if folder.is_dir())


def test_a_run_waits_for_an_orphan_of_a_killed_sweep(tmp_path):
    plan = plan_of(norms=("none",))
    sweep.write_plan(plan, tmp_path)
    folder = tmp_path / plan.runs[0].id
    folder.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from normlab import run\n"
        "with run.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(2)"
    )
    orphan = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert orphan.stdout.readline() == "held\n"
    states = pool.run_plan(plan, tmp_path, 1, 1, lambda event: None)
    assert set(states.values()) == {"done"}
    assert orphan.wait() == 0


def test_a_field_that_one_normalizer_has_otherwise_is_said_to_be_its_own():
    varied = grid.grid(
        {"norm": ["batch_norm"]}, fixed={"optim.base_lr": 0.1, "train.batch_size": 8}
    )
    varied += grid.grid({"norm": ["none"]}, fixed={"optim.base_lr": 0.001, "train.batch_size": 8})
    plan = sweep.make_plan("configs/digits.py", varied, seeds=[0], overrides={})
    assert plan.settings == {
        "base": {
            "batch_norm: optim.base_lr": 0.1,
            "none: optim.base_lr": 0.001,
            "train.batch_size": 8,
        }
    }

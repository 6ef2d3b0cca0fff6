"""How the runs of a sweep share a machine."""

import json
import os
import signal

import pytest

from normlab import pool, sweep, ways
from normlab.errors import UserError
from normlab.grid import Point
from normlab.launchers import parse

TRIVIAL = {
    "model.widths": (4, 8),
    "model.strides": (2, 2),
    "train.num_steps": 12,
    "log.every_steps": 6,
    "eval.every_steps": 6,
    "checkpoint.every_steps": 6,
    "log.tensorboard": False,
}


def plan_of(norms=("batch_norm",), seeds=2, **fields):
    grid = [Point(fields={"norm": norm}) for norm in norms]
    overrides = TRIVIAL | {name.replace("__", "."): x for name, x in fields.items()}
    return sweep.make_plan("configs/digits.py", grid, seeds=range(seeds), overrides=overrides)


def planned(seed, norm="batch_norm"):
    labels = {"setting": "base", "norm": norm, "seed": seed}
    overrides = {"train.num_steps": 5, "seed": seed}
    return sweep.PlannedRun(f"{norm}{seed}", labels, f"configs/digits.py:norm={norm}", overrides)


def test_groups_are_seeds_of_one_config():
    """Five seeds of one and one of another, on three devices: 3 + 2, and 1."""
    runs = [planned(0), planned(0, "layer_norm"), *(planned(seed) for seed in (1, 2, 3, 4))]
    found = [[run.id for run in group] for group in ways.groups(runs, 3)]
    assert found == [
        ["batch_norm0", "batch_norm1", "batch_norm2"],
        ["layer_norm0"],
        ["batch_norm3", "batch_norm4"],
    ]


def measured(alone, many=None, together=None, devices=1):
    """A measurement that finds these seconds a step: of one run, of two workers, on devices."""
    asked = []

    def measure(worker, runs, steps):
        asked.append((worker, len(runs), steps))
        seconds = together if len(runs) > 1 else (many if asked.count((1, 1, 20)) else alone)
        if seconds is None:
            return {"message": "no"}
        return {"step_seconds": seconds, "steps": 20, "devices": devices}

    return measure


@pytest.mark.parametrize(
    ("measure", "workers", "expected"),
    [
        (measured(0.01), 1, ways.Way("loop", 1)),
        # Two processes at 12 ms a step each: 6 ms a run's step, against 10.
        (
            lambda n, runs, steps: seconds(0.01 if steps is None else 0.012),
            2,
            ways.Way("processes", 2),
        ),
        # At 20 ms each nothing is gained.
        (lambda n, runs, steps: seconds(0.01 if steps is None else 0.020), 2, ways.Way("loop", 1)),
        # Three seeds on four devices take 11 ms together.
        (measured(0.01, together=0.011, devices=4), 1, ways.Way("devices", 1, 3)),
        # Where the devices cannot, they are passed over.
        (measured(0.01, together=None, devices=4), 1, ways.Way("loop", 1)),
    ],
)
def test_the_fastest_way_is_taken(measure, workers, expected):
    way, why = ways.choose([planned(seed) for seed in range(3)], workers, measure)
    assert way == expected
    assert why.startswith(expected.name)
    assert "loop 10" in why


def seconds(step):
    return {"step_seconds": step, "steps": 20, "devices": 1}


def test_what_cannot_be_measured_is_left_to_the_runs():
    way, why = ways.choose([planned(0)], 2, lambda n, runs, steps: {"message": "no data"})
    assert (way, why) == (ways.Way("processes", 2), "not measured: no data")


def test_the_way_whose_last_bits_are_others_can_be_left_out():
    measure = measured(0.01, together=0.001, devices=4)
    runs = [planned(seed) for seed in range(3)]
    assert ways.choose(runs, 1, measure)[0].name == "devices"
    assert ways.choose(runs, 1, measure, by_device=False)[0].name == "loop"


def bytes_of(folder, plan):
    return {run.id: (folder / run.id / "metrics.jsonl").read_bytes() for run in plan.runs}


def sweep_in(folder, plan, jobs=None, seeds="auto"):
    events = []
    with sweep.held(folder):
        sweep.write_plan(plan, folder)
        states = pool.run_plan(plan, folder, jobs, 1, events.append, seeds)
    assert set(states.values()) == {"done"}
    return events


def test_a_short_sweep_is_not_measured(tmp_path):
    """Two runs of 12 steps."""
    assert all(event.label != "seeds at a time" for event in sweep_in(tmp_path, plan_of()))


@pytest.mark.devices
def test_a_sweep_measures_says_its_choice_and_gives_the_bytes_of_any_way(tmp_path, monkeypatch):
    monkeypatch.setattr(ways, "WORTH_MEASURING", 24)
    plan = plan_of()
    events = sweep_in(tmp_path / "auto", plan)
    if len(os.sched_getaffinity(0)) > 1:
        assert events[0].label == "seeds at a time"
        assert "ms a run's step" in events[0].message
        assert events[0].finished == 0
    sweep_in(tmp_path / "loop", plan, seeds="loop")
    assert bytes_of(tmp_path / "auto", plan) == bytes_of(tmp_path / "loop", plan)
    assert not sweep_in(tmp_path / "auto", plan)  # nothing is left, so nothing is measured


def test_a_wrong_way_is_named():
    assert parse("local:seeds=loop").seeds == "loop"
    with pytest.raises(UserError, match=r"'loops'.*'loop'"):
        parse("local:seeds=loops")


def test_numbers_of_processes_and_another_way_do_not_go_together(tmp_path):
    with pytest.raises(UserError, match=r"--jobs=2 are processes"):
        parse("local:seeds=loop")(None, tmp_path, 2, 1, print)


def stopped(folder, plan, seeds):
    """Sweeps until a run has logged something, then gets SIGTERM."""

    def on_event(event):
        if event.fraction > 0 and not event.ended:
            os.kill(os.getpid(), signal.SIGTERM)

    with sweep.held(folder):
        sweep.write_plan(plan, folder)
        with pytest.raises(pool.Stopped) as stop:
            pool.run_plan(plan, folder, None, 1, on_event, seeds)
    assert stop.value.exit_code == 128 + signal.SIGTERM


def status_of(folder, run):
    return json.loads((folder / run.id / "status.json").read_text())


def test_a_signal_saves_the_runs_of_all_processes(tmp_path):
    plan = plan_of(train__num_steps=3000)
    stopped(tmp_path, plan, "processes")
    begun = [run for run in plan.runs if (tmp_path / run.id / "status.json").exists()]
    assert begun
    for run in begun:
        status = status_of(tmp_path, run)
        assert status["status"] == "interrupted"
        assert [path.name for path in (tmp_path / run.id / "checkpoints").iterdir()][-1:]
        assert status["step"] > 0


@pytest.fixture
def four_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")


@pytest.mark.devices
def test_seeds_a_device_each_give_the_numbers_of_one_after_another(tmp_path, four_devices):
    """Six runs, two normalizers: groups of three on four devices.

    Group normalization notes in each run's log how its 32 groups were settled, in that log alone.
    """
    plan = plan_of(norms=("batch_norm", "group_norm"), seeds=3)
    sweep_in(tmp_path / "devices", plan, seeds="devices")
    sweep_in(tmp_path / "loop", plan, seeds="loop")
    for run in plan.runs:
        folders = [tmp_path / way / run.id for way in ("devices", "loop")]
        assert_same_lines(*folders)
        beside, alone = (json.loads((folder / "result.json").read_text()) for folder in folders)
        assert beside["step_memory_bytes"] > 0
        # Without the others' compilers, which take seconds.
        assert 0 < beside["step_seconds"] < 0.2 + 5 * alone["step_seconds"]
        log = (folders[0] / "log.txt").read_text()
        assert log == (folders[1] / "log.txt").read_text()
        assert ("groups" in log) == (run.labels["norm"] == "group_norm")


def assert_same_lines(folder, other):
    a, b = (
        [json.loads(line) for line in (where / "metrics.jsonl").open()] for where in (folder, other)
    )
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for line, same in zip(a, b, strict=True):
        numbers = {name: x for name, x in same.items() if name != "split"}
        assert {name: line[name] for name in numbers} == pytest.approx(numbers, abs=1e-5)


@pytest.mark.devices
def test_seeds_on_devices_are_saved_by_a_signal_and_go_on_in_another_way(tmp_path, four_devices):
    plan = plan_of(seeds=3, train__num_steps=120)
    folder = tmp_path / "moved"
    stopped(folder, plan, "devices")
    saved = [status_of(folder, run) for run in plan.runs]
    assert {status["status"] for status in saved} == {"interrupted"}
    assert all(0 < status["step"] < 120 for status in saved)
    sweep_in(folder, plan, seeds="loop")
    sweep_in(tmp_path / "loop", plan, seeds="loop")
    for run in plan.runs:
        assert_same_lines(folder / run.id, tmp_path / "loop" / run.id)


@pytest.mark.devices
def test_a_seed_that_fails_beside_others_costs_them_nothing(tmp_path, four_devices):
    """The second seed's folder is somebody else's; the others take their steps alone."""
    plan = plan_of(seeds=3)
    folder = tmp_path / "sweep"
    with sweep.held(folder):
        sweep.write_plan(plan, folder)
        (folder / plan.runs[1].id).mkdir()
        (folder / plan.runs[1].id / "thesis.tex").touch()
        states = pool.run_plan(plan, folder, None, 1, lambda event: None, "devices")
    assert [states[run.id] for run in plan.runs] == ["done", "failed", "done"]
    sweep_in(tmp_path / "loop", plan, seeds="loop")
    for run in (plan.runs[0], plan.runs[2]):
        assert_same_lines(folder / run.id, tmp_path / "loop" / run.id)


@pytest.mark.devices
def test_a_run_that_diverges_beside_others_ends_alone(tmp_path, four_devices):
    """Learning rate 1e30 for all; the seeds end, each in its folder, as diverged."""
    plan = plan_of(seeds=3, optim__base_lr=1e30, train__max_nonfinite=2)
    folder = tmp_path / "sweep"
    with sweep.held(folder):
        sweep.write_plan(plan, folder)
        states = pool.run_plan(plan, folder, None, 1, lambda event: None, "devices")
    assert set(states.values()) == {"diverged"}
    for run in plan.runs:
        assert json.loads((folder / run.id / "result.json").read_text())["status"] == "diverged"


@pytest.mark.devices
def test_statistics_by_device_keep_a_seed_from_a_device_of_its_own(tmp_path, four_devices):
    plan = plan_of(batch_stats__scope="device")
    folder = tmp_path / "sweep"
    with sweep.held(folder):
        sweep.write_plan(plan, folder)
        events = []
        states = pool.run_plan(plan, folder, None, 1, events.append, "devices")
    assert set(states.values()) == {"failed"}
    assert "would be another run" in events[-1].message

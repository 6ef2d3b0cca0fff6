"""Runs looked at while they are written: what is new, cut off, cut back, gone."""

import io
import json
import shutil
import subprocess
import sys

import pytest

from normlab import run
from normlab.errors import UserError
from normlab.report import live
from normlab.report.live import Log, Watched

ONE = {"settings": {"base": {}}, "norms": ("batch_norm",), "seeds": (0,)}


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def metrics(*accuracies, start=10):
    records = [
        {"step": start + 10 * index, "split": "test", "accuracy": accuracy}
        for index, accuracy in enumerate(accuracies)
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


def timing(*points):
    names = ("step", "seconds", "train_seconds")
    return "".join(json.dumps(dict(zip(names, point, strict=True))) + "\n" for point in points)


@pytest.fixture
def running(tmp_path):
    """A run folder in progress, whose lock this process holds: 100 steps, nothing logged yet."""
    folder = tmp_path / "run"
    write_json(folder / "identity.json", {"norm": {"kind": "layer_norm"}, "seed": 4})
    write_json(folder / "manifest.json", {"num_steps": 100})
    run.write_status(folder, "running", 0)
    with run.locked(folder):
        yield folder


# One log


def test_a_log_gives_each_line_once_and_a_cut_off_one_when_it_is_whole(tmp_path):
    log = Log(tmp_path / "log")
    assert log.read_on() == (False, [])
    log.path.write_bytes(b"one\ntwo\nthr")
    assert log.read_on() == (False, [b"one", b"two"])
    assert log.read_on() == (False, [])
    with log.path.open("ab") as file:
        file.write(b"ee\nfour\n")
    assert log.read_on() == (False, [b"three", b"four"])


@pytest.mark.parametrize("after", [b"", b"one\n", b"one\nTWO\n", b"one\nTWO AND MORE\nfour\n"])
def test_a_log_that_was_cut_back_begins_anew(after, tmp_path):
    log = Log(tmp_path / "log")
    log.path.write_bytes(b"one\ntwo\nthree\n")
    log.read_on()
    log.path.write_bytes(after)
    assert log.read_on() == (True, after.splitlines())
    assert log.read_on() == (False, [])


def test_a_log_that_is_gone_begins_anew(tmp_path):
    log = Log(tmp_path / "log")
    log.path.write_bytes(b"one\n")
    log.read_on()
    log.path.unlink()
    assert log.read_on() == (True, [])
    log.path.write_bytes(b"other\n")
    assert log.read_on() == (False, [b"other"])


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    """Or a thousand runs would be read whole at each look."""
    log, read = Log(tmp_path / "log"), []

    class Counting(io.FileIO):
        def read(self, size):
            read.append(len(data := super().read(size)))
            return data

    monkeypatch.setattr(type(log.path), "open", lambda path, mode: Counting(path, mode))
    log.path.write_bytes(b"0123456\n" * 1000)
    log.read_on()
    log.read_on()
    assert read == [8000]
    log.path.write_bytes(b"0123456\n" * 1001)
    log.read_on()
    # The new line, and the end of the line before it.
    assert read == [8000, 9]


def test_a_large_log_is_read_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "LARGEST_LOOK", 20)
    log = Log(tmp_path / "log")
    log.path.write_bytes(b"0123456\n" * 10)
    parts = [len(lines) for _, lines in log.news()]
    # Two lines and a half, and from then on one byte less, of the end of the line before.
    assert parts == [2, 2, 2, 2, 2, 0]


# One run


def test_a_run_is_what_its_files_say(running):
    (running / "metrics.jsonl").write_text(
        json.dumps({"step": 20, "split": "train", "loss": 0.5, "accuracy": 0.8})
        + "\n"
        + json.dumps({"step": 20, "split": "validation", "accuracy": 0.7})
        + "\nnot a line\n[]\n"
        + metrics(0.25, 0.75)
    )
    (running / "timing.jsonl").write_text(timing((20, 5.0, 4.0), (40, 9.0, 8.0)))
    [live] = Watched(running).look()
    assert (live.norm, live.seed, live.state) == ("layer_norm", 4, "running")
    assert (live.step, live.num_steps) == (40, 100)
    assert (live.train_loss, live.validation_accuracy) == (0.5, 0.7)
    assert live.test_accuracies == [0.25, 0.75]
    # 20 steps in 4 seconds; so the other 60 take 12, of which 2 are over.
    assert live.steps_per_second == 5.0
    assert live.seconds_left(live.timing.changed + 2.0) == pytest.approx(10.0)
    assert live.seconds_left(live.timing.changed + 60.0) == 0.0


def test_the_speed_at_the_first_lines_is_that_of_training(running):
    """All at one step: there is no second step to take a difference from."""
    (running / "timing.jsonl").write_text(timing((20, 9.0, 4.0), (20, 10.0, 4.0)))
    [live] = Watched(running).look()
    assert live.steps_per_second == 5.0


def test_a_later_look_adds_what_was_written_since(running):
    watched = Watched(running)
    assert watched.look()[0].test_accuracy is None
    with (running / "metrics.jsonl").open("a") as file:
        file.write(metrics(0.25)[:-5])
    assert watched.look()[0].test_accuracy is None
    with (running / "metrics.jsonl").open("a") as file:
        file.write(metrics(0.25)[-5:] + metrics(0.5, start=20))
    assert watched.look()[0].test_accuracies == [0.25, 0.5]


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(running):
    watched = Watched(running)
    (running / "metrics.jsonl").write_text(metrics(0.25, 0.5, 0.75))
    (running / "timing.jsonl").write_text(timing((10, 1.0, 1.0), (20, 2.0, 2.0), (30, 3.0, 3.0)))
    assert watched.look()[0].step == 30
    run.truncate_logs(
        running, {"metrics.jsonl": len(metrics(0.25)), "timing.jsonl": len(timing((10, 1.0, 1.0)))}
    )
    [live] = watched.look()
    assert (live.step, live.test_accuracies) == (10, [0.25])
    with (running / "metrics.jsonl").open("a") as file:
        file.write(metrics(0.5, start=20))
    assert watched.look()[0].test_accuracies == [0.25, 0.5]


def test_a_run_without_its_process_is_interrupted(tmp_path):
    write_json(tmp_path / "identity.json", {})
    run.write_status(tmp_path, "running", 7)
    watched = Watched(tmp_path)
    [live] = watched.look()
    assert (live.state, live.step) == ("interrupted", 7)
    assert watched.is_over()
    with run.locked(tmp_path):
        assert watched.look()[0].state == "running"
        assert not watched.is_over()


def test_files_of_nonsense_are_a_state_and_no_error(tmp_path):
    for name in ("identity.json", "manifest.json", "status.json"):
        (tmp_path / name).write_text("[1")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n{}\n" + b"[" * 100_000 + b"\n")
    (tmp_path / "timing.jsonl").write_text('{"step": "x"}\n{"step": 3}\n')
    [live] = Watched(tmp_path).look()
    assert (live.state, live.step, live.norm) == ("planned", 0, "")
    write_json(tmp_path / "status.json", {"status": "on fire", "step": 5})
    [live] = Watched(tmp_path).look()
    assert (live.state, live.step) == ("interrupted", 5)


# Folders


def test_a_sweep_has_each_of_its_runs_once(make_sweep, tmp_path):
    make_sweep(
        tmp_path,
        norms=("none", "batch_norm"),
        seeds=(0,),
        run=lambda setting, norm, seed: None if setting == "lr x5" else {},
    )
    plan = json.loads((tmp_path / "sweep.json").read_text())
    plan["runs"] += [{"id": "../elsewhere", "labels": {}}, {"id": "x"}, "run"]
    write_json(tmp_path / "sweep.json", plan)
    watched = Watched(tmp_path)
    named = [(live.setting, live.norm, live.seed, live.state) for live in watched.look()]
    assert named == [
        ("base", "none", 0, "done"),
        ("base", "batch_norm", 0, "done"),
        ("lr x5", "none", 0, "planned"),
        ("lr x5", "batch_norm", 0, "planned"),
        ("ghost 1", "batch_norm", 0, "done"),
    ]
    assert not watched.is_over()
    assert not watched.is_worked_on()
    with run.locked(tmp_path):
        assert watched.is_worked_on()


def test_a_sweep_is_over_when_its_runs_have_ended_and_nobody_holds_it(make_sweep, tmp_path):
    """While it is held, a run that crashed may be started again."""
    watched = Watched(make_sweep(tmp_path, **ONE, run=lambda *_: {"state": "failed"}))
    watched.look()
    with run.locked(tmp_path):
        assert not watched.is_over()
    assert watched.is_over()


def test_runs_come_and_go_between_two_looks(make_sweep, tmp_path):
    folder = make_sweep(tmp_path / "sweep", **ONE)
    watched = Watched(folder)
    [live] = watched.look()
    assert live.test_accuracies
    shutil.rmtree(live.folder)
    assert [(live.state, live.test_accuracies) for live in watched.look()] == [("planned", [])]
    plan = json.loads((folder / "sweep.json").read_text())
    plan["runs"].append({"id": "new", "labels": {"norm": "none", "seed": 1}})
    write_json(folder / "sweep.json", plan)
    assert [live.norm for live in watched.look()] == ["batch_norm", "none"]


def test_a_folder_of_run_folders(make_run, tmp_path):
    make_run(tmp_path / "b", norm="none", seed=2)
    (tmp_path / "notes").mkdir()
    watched = Watched(tmp_path)
    assert [(x.setting, x.norm, x.seed) for x in watched.look()] == [("b", "none", 2)]
    make_run(tmp_path / "a")
    assert [live.setting for live in watched.look()] == ["a", "b"]
    # A run that was refused, for its data say, leaves an identity and will never begin.
    write_json(tmp_path / "c" / "identity.json", {})
    assert watched.look()[2].state == "planned"
    assert watched.is_over()


def test_a_name_cannot_command_the_terminal(tmp_path):
    labels = {"setting": "\x1b[2J", "norm": "a\nb", "seed": 0, "tuned": {"optim.base_lr": "\x07"}}
    write_json(tmp_path / "sweep.json", {"runs": [{"id": "x", "labels": labels}]})
    [live] = Watched(tmp_path).look()
    assert live.norm == "a b"
    assert live.setting.isprintable()


def test_a_folder_without_runs_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Watched(tmp_path / "none").look()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        Watched(tmp_path / "file").look()
    with pytest.raises(UserError, match="holds no run"):
        Watched(tmp_path).look()


def test_watching_imports_no_jax():
    script = (
        "import sys, normlab.report.live, normlab.cli.watch\n"
        "assert not {'jax', 'numpy', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

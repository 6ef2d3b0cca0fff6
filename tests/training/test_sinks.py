"""Where lines go beside metrics.jsonl: what arrives, what is taken back, what a fault costs."""

import json
import os
import struct
import subprocess
import sys
import types

import pytest

from normlab.config import load_config
from normlab.errors import UserError
from normlab.grid import grid
from normlab.sweep import make_plan
from normlab.training import sinks
from normlab.training.loop import train
from normlab.training.setup import id_of

SMALL = {
    "model.widths": (4,),
    "model.strides": (2,),
    "train.num_steps": 12,
    "log.every_steps": 5,
    "eval.every_steps": 6,
    "checkpoint.every_steps": 4,
}


def small(**fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config("configs/digits.py", SMALL | names)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cut_at(step, split):
    def progress(at, _total, line):
        if line and (at, line["split"]) == (step, split):
            raise KeyboardInterrupt

    return progress


# TensorBoard


def events(path):
    """The events of a file; each record: length, its checksum, bytes, their checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, found = path.read_bytes(), []
    while data:
        length, length_check = struct.unpack("<QI", data[:12])
        record = data[12 : 12 + length]
        [check] = struct.unpack("<I", data[12 + length : 16 + length])
        assert length_check == masked_crc32c(data[:8])
        assert check == masked_crc32c(record)
        found.append(Event.FromString(record))
        data = data[16 + length :]
    return found


def shown(folder):
    """[(step, name, value)] as TensorBoard shows them: a file that starts at a step takes back all
    from it on.
    """
    scalars = []
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in events(path):
            if event.HasField("session_log"):
                scalars = [scalar for scalar in scalars if scalar[0] < event.step]
            scalars += [
                (event.step, value.tag, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
            ]
    return scalars


def written(folder):
    """The same from metrics.jsonl, in float32 as event files have it."""
    return [
        (line["step"], f"{line['split']}/{name}", struct.unpack("f", struct.pack("f", value))[0])
        for line in lines(folder)
        for name, value in line.items()
        if isinstance(value, (int, float)) and name != "step"
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sinks") / "run"
    train(small(), folder)
    return folder


def test_tensorboard_has_the_lines_and_the_config_once(finished):
    found = shown(finished)
    assert found == written(finished)
    assert {"test/accuracy", "train/loss"} <= {name for _, name, _ in found}
    [path] = (finished / "tensorboard").iterdir()
    first, *rest = events(path)
    assert first.file_version == "brain.Event:2"
    [text] = [
        value
        for event in rest
        for value in event.summary.value
        if value.tag == "config/text_summary"
    ]
    assert b'"kind": "batch_norm"' in text.tensor.string_val[0]


@pytest.mark.parametrize("at", [(5, "train"), (6, "test"), (10, "train"), (12, "test")])
def test_a_resumed_run_shows_no_step_twice_and_loses_none(at, finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path / "run", progress=cut_at(*at))
    train(small(), tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert sorted(shown(tmp_path / "run")) == sorted(written(finished))


def test_the_lines_of_a_killed_run_are_there(tmp_path):
    """SIGKILL at the first line of the test set: nothing may wait in a buffer."""
    script = (
        "import os, signal\n"
        "from tests.training.test_sinks import small\n"
        "from normlab.training.loop import train\n"
        "def kill(step, _, line):\n"
        "    if line and line['split'] == 'test': os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train(small(), {str(tmp_path / 'run')!r}, progress=kill)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert [step for step, name, _ in shown(tmp_path / "run") if name == "test/accuracy"] == [6]


def test_off_means_no_files_and_the_same_metrics(finished, tmp_path):
    train(small(log__tensorboard=False), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    ours, theirs = (folder / "metrics.jsonl" for folder in (tmp_path / "run", finished))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_sink_that_cannot_write_is_named_once_and_the_run_goes_on(finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "identity.json").write_bytes((finished / "identity.json").read_bytes())
    (tmp_path / "run" / "tensorboard").mkdir()
    (tmp_path / "run" / "tensorboard" / "events.out.tfevents.00001").symlink_to("/dev/full")
    assert train(small(), tmp_path / "run")["status"] == "done"
    warnings = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert warnings == [
        "WARNING TensorBoard gets no more lines of this run: [Errno 28] No space left on device"
    ]
    ours, theirs = (folder / "metrics.jsonl" for folder in (tmp_path / "run", finished))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_sink_that_fails_midway_gets_nothing_more(caplog):
    got = []

    def fail_at_two(line):
        got.append(line["step"])
        if line["step"] == 2:
            raise OSError("gone")

    send = sinks._guarded("it", lambda: fail_at_two)
    for step in (1, 2, 3):
        send({"step": step})
    assert got == [1, 2]
    assert caplog.text.count("it gets no more lines of this run: gone") == 1


def test_without_the_library_training_goes_on_with_a_line_in_the_log(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    assert train(small(train__num_steps=1), tmp_path / "run")["status"] == "done"
    assert "TensorBoard gets no more lines" in (tmp_path / "run" / "log.txt").read_text()


def test_neither_tensorflow_nor_torch_is_imported(tmp_path):
    """tensorboardX would load torch if it could; an importable one stands in the way here."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    script = (
        "import sys\n"
        "from tests.training.test_sinks import small\n"
        "from normlab.training.loop import train\n"
        f"train(small(), {str(tmp_path / 'run')!r})\n"
        "assert 'tensorboardX' in sys.modules\n"
        "assert not {'torch', 'tensorflow', 'tensorboard'} & set(sys.modules)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_numbers_leaves_out_what_is_none():
    line = {"step": 3, "split": "train", "loss": float("nan"), "accuracy": None, "nonfinite": 2}
    assert sinks.numbers(line) == {"train/nonfinite": 2}


# Weights & Biases


class StandIn(types.ModuleType):
    """A module with the calls that are made of wandb, each noted."""

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.calls = []
        self.fails = fails

    def note(self, call, *arguments, **named):
        self.calls.append((call, arguments, named))
        if call == self.fails:
            raise RuntimeError(f"{call} failed")
        return self

    def init(self, **named):
        return self.note("init", **named)

    def log(self, values, step):
        self.note("log", values, step)

    def finish(self, exit_code):
        self.note("finish", exit_code)

    def Settings(self, **named):
        return named


def install(monkeypatch, **arguments):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(**arguments))
    return sys.modules["wandb"].calls


def test_wandb_gets_the_run_its_labels_and_its_lines(monkeypatch, finished, tmp_path):
    calls = install(monkeypatch)
    config = small(log__wandb_project="norms")
    folder = tmp_path / id_of(config)
    plan = {"runs": [{"id": id_of(config), "labels": {"setting": "batch of 2", "norm": "x"}}]}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    train(config, folder)
    (name, _, named), *logged, last = calls
    assert name == "init"
    assert (named["project"], named["id"], named["resume"]) == ("norms", id_of(config), "allow")
    assert named["dir"] == str(folder)
    assert named["tags"] == ["digits", "cnn", "batch_norm", "seed 0", "batch of 2"]
    assert named["config"]["norm.kind"] == "batch_norm"
    assert named["settings"] == {"silent": True, "console": "off"}
    assert [(x[1], x[0]) for _, x, _ in logged] == [
        (line["step"], sinks.numbers(line)) for line in lines(folder)
    ]
    assert last == ("finish", (0,), {})
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_wandb_is_told_of_a_run_that_ended_badly(monkeypatch, tmp_path):
    calls = install(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(small(log__wandb_project="p"), tmp_path / "run", progress=cut_at(6, "test"))
    assert calls[-1] == ("finish", (1,), {})


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_no_failure_of_wandb_ends_a_run(call, monkeypatch, tmp_path):
    calls = install(monkeypatch, fails=call)
    assert train(small(log__wandb_project="p"), tmp_path / "run")["status"] == "done"
    assert [name for name, _, _ in calls].count(call) == 1
    log = tmp_path / "run" / "log.txt"
    warned = log.read_text().count("Weights & Biases gets no more lines of this run")
    assert warned == (0 if call == "finish" else 1)


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["absent", "a folder"])
def test_wandb_asked_for_and_absent_is_a_mistake_before_anything_is_written(
    module, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "wandb", module)
    asked = "'log.wandb_project' = 'p' needs .*pip install wandb"
    with pytest.raises(UserError, match=asked):
        train(small(log__wandb_project="p"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=asked):
        make_plan(
            "configs/digits.py",
            grid({"norm": ["none"]}),
            seeds=[0],
            overrides={"log.wandb_project": "p"},
        )


# Identity


def test_where_lines_go_is_no_part_of_a_runs_id():
    assert id_of(small(log__tensorboard=False, log__wandb_project="p")) == id_of(small())
    assert id_of(small(seed=1)) != id_of(small())

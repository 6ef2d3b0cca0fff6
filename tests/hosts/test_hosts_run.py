"""One run in several processes: the same science, and nothing lost when one of them dies."""

import json
import signal
import time

import numpy as np
import pytest
from several import (
    FIELDS,
    ended,
    final_state,
    kill,
    start,
    wait_for_checkpoint,
)

from normlab import run
from normlab.config import load_config
from normlab.training.loop import train
from normlab.training.restore import evaluate_run


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder, other, config):
    """The same lines and the same final state, to the tolerance of float32 sums."""
    ours, theirs = lines(folder), lines(other)
    assert [(x["step"], x["split"]) for x in ours] == [(x["step"], x["split"]) for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
        assert a.get("learning_rate") == b.get("learning_rate")
    manifests = [json.loads((x / "manifest.json").read_text()) for x in (folder, other)]
    for name in ("id", "data_order_hash", "augmentation_hash", "init_hashes"):
        assert manifests[0][name] == manifests[1][name]
    (step, state), (other_step, other_state) = (final_state(x, config) for x in (folder, other))
    assert step == other_step
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        np.testing.assert_allclose(value, other_state[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_two_processes_make_the_run_of_one(tmp_path):
    fields = {**FIELDS, "train.num_steps": 8, "data.crop_padding": 1}
    both = ended(start(2, tmp_path / "two", fields))
    assert [code for code, _ in both] == [0, 0], both
    assert [errors for _, errors in both] == ["", ""]
    config = load_config("configs/digits.py", fields)
    train(config, tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one", config)
    # Each of the 360 test images once, whatever the number of processes.
    accuracy = json.loads((tmp_path / "two/result.json").read_text())["test_accuracy"]
    assert (360 * accuracy) % 1 == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "dying"), [(2, 1), (2, 0), (4, 2)])
def test_a_process_killed_costs_the_steps_since_the_last_checkpoint(tmp_path, count, dying):
    fields = {
        **FIELDS,
        "train.num_steps": 120,
        "checkpoint.every_steps": 20,
        "eval.every_steps": 50,
    }
    assert [code for code, _ in ended(start(count, tmp_path / "whole", fields))] == [0] * count

    processes = start(count, tmp_path / "killed", fields, timeout=30)
    wait_for_checkpoint(tmp_path / "killed", processes, 40)
    kill(processes[dying])
    began = time.monotonic()
    found = ended(processes)
    assert time.monotonic() - began < 30
    for index, (code, errors) in enumerate(found):
        [line] = errors.splitlines()
        who = f"normlab: process {index} of {count}"
        says = "was ended by SIGKILL" if index == dying else "stops: another process has ended"
        assert line.startswith(f"{who} {says}"), errors
        assert line.endswith("start all processes again with the same command, and the run goes on")
        assert code == 1
    assert run.read_status(tmp_path / "killed") in ("failed", "interrupted")

    assert [code for code, _ in ended(start(count, tmp_path / "killed", fields))] == [0] * count
    assert "resumed at step" in (tmp_path / "killed/log.txt").read_text()
    config = load_config("configs/digits.py", fields)
    (_, state), (_, other) = (final_state(tmp_path / x, config) for x in ("whole", "killed"))
    assert {name: value.tobytes() for name, value in state.items()} == {
        name: value.tobytes() for name, value in other.items()
    }
    whole, killed = ((tmp_path / x / "metrics.jsonl").read_bytes() for x in ("whole", "killed"))
    assert whole == killed
    # And it is the run of one process.
    train(config, tmp_path / "one")
    assert_same_run(tmp_path / "killed", tmp_path / "one", config)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    fields = {**FIELDS, "train.num_steps": 100_000, "eval.every_steps": 100_000}
    processes = start(2, tmp_path, fields)
    wait_for_checkpoint(tmp_path, processes)
    processes[1].send_signal(signal.SIGTERM)
    found = ended(processes)
    assert [code for code, _ in found] == [143, 143]
    assert found[0][1] == found[1][1]
    assert "stopped by SIGTERM at step" in found[0][1]
    assert run.read_status(tmp_path) == "interrupted"


@pytest.mark.slow
def test_what_one_process_cannot_do_ends_all_with_its_line(tmp_path):
    fields = {**FIELDS, "train.num_steps": 5}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").write_text("years of work")
    found = ended(start(2, tmp_path / "taken", fields))
    assert [code for code, _ in found] == [2, 2]
    assert found[0][1] == found[1][1]
    assert "holds 'thesis.tex'" in found[0][1]

    found = ended(start(2, tmp_path / "other", fields, own={1: ["--config.seed=1"]}))
    assert [code for code, _ in found] == [2, 2]
    assert "config field 'seed' is 0 in process 0 and 1 in process 1" in found[1][1]


@pytest.mark.slow
def test_a_process_that_does_not_come_is_not_waited_for_for_ever(tmp_path):
    present, absent = start(2, tmp_path / "run", {**FIELDS, "train.num_steps": 5}, timeout=5)
    absent.kill()
    [(code, errors), _] = ended([present, absent], 60)
    assert code == 1
    assert "was not heard of for 5 seconds" in errors
    assert errors.count("\n") == 1


# Devices and processes


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_number_of_processes_and_devices(tmp_path):
    """Two processes of two devices, then eight devices of one, then one device."""
    fields = {**FIELDS, "train.num_steps": 12}
    config = load_config("configs/digits.py", fields)
    train(config, tmp_path / "one")
    folder = tmp_path / "moved"
    for stop, count, devices in ((4, 2, 2), (8, 1, 8), (12, 1, 1)):
        # The schedule is that of 12 steps; what cuts the run off is SIGTERM behind a checkpoint.
        processes = start(count, folder, fields, devices=devices)
        if stop < 12:
            wait_for_checkpoint(folder, processes, stop)
            processes[0].send_signal(signal.SIGTERM)
        for code, errors in ended(processes):
            assert code in (0, 143), errors
    assert_same_run(folder, tmp_path / "one", config)
    assert evaluate_run(folder)["test_accuracy"] == pytest.approx(
        json.loads((tmp_path / "one/result.json").read_text())["test_accuracy"]
    )

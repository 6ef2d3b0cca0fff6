"""One run in several processes: the same science, and nothing lost when one of them dies."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from several import (
    FIELDS,
    ended,
    environment,
    final_state,
    free_port,
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


def assert_same_run(folder, other, config, drawn=True):
    """The same lines and the same final state, to the tolerance of float32 sums.

    And the same initial values to the bit, if they are `drawn` and not computed from data.
    """
    ours, theirs = lines(folder), lines(other)
    assert [(x["step"], x["split"]) for x in ours] == [(x["step"], x["split"]) for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
        assert a.get("learning_rate") == b.get("learning_rate")
    manifests = [json.loads((x / "manifest.json").read_text()) for x in (folder, other)]
    exact = "id", "data_order_hash", "augmentation_hash", *(("init_hashes",) if drawn else ())
    for name in exact:
        assert manifests[0][name] == manifests[1][name]
    (step, state), (other_step, other_state) = (final_state(x, config) for x in (folder, other))
    assert step == other_step
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        np.testing.assert_allclose(value, other_state[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.devices
def test_two_processes_make_the_run_of_one(tmp_path):
    fields = {**FIELDS, "train.num_steps": 6, "data.crop_padding": 1}
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
        assert errors.count("\n") == 1, errors
        line = errors.strip()
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


def cut(folder, fields, step, count, devices):
    """Begins a run, or goes on with it, and cuts it off at the first line from `step` on."""
    place = [
        [f"127.0.0.1:{port}", str(count), str(i)] for port in [free_port()] for i in range(count)
    ]
    program = [sys.executable, str(Path(__file__).with_name("cut_run.py")), str(folder), str(step)]
    processes = [
        subprocess.Popen(
            [*program, json.dumps(fields), *of_one],
            env=environment(devices),
            stderr=subprocess.PIPE,
            text=True,
        )
        for of_one in place
    ]
    found = ended(processes)
    assert "cut" in found[0][1]


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_number_of_processes_and_devices_and_in_any_mode(tmp_path):
    fields = {**FIELDS, "train.num_steps": 20}
    config = load_config("configs/digits.py", fields)
    train(config, tmp_path / "one")
    folder = tmp_path / "moved"
    # Checkpoints come at each fourth step, lines at each fifth: so it resumes at 4, 8, 12 and 16.
    cut(folder, fields, 5, count=2, devices=2)
    cut(folder, fields, 10, count=1, devices=8)
    cut(folder, {**fields, "parallel.mode": "pmap"}, 15, count=1, devices=4)
    assert [code for code, _ in ended(start(2, folder, fields))] == [0, 0]
    log = (folder / "log.txt").read_text()
    assert [f"resumed at step {step}" in log for step in (4, 8, 12)] == [True] * 3
    assert_same_run(folder, tmp_path / "one", config)
    found = json.loads((tmp_path / "one/result.json").read_text())
    assert evaluate_run(folder)["test_loss"] == pytest.approx(found["test_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"parallel.pad_batch": True, "train.batch_size": 63},
        {"train.microbatches": 2, "batch_stats.scope": "ghost", "batch_stats.ghost_size": 16},
        {"data.mixup_alpha": 0.4, "train.ema_decay": 0.9, "optim.sam_rho": 0.05},
        {"probe.layers": "norm*", "probe.layer": "norm1", "eval.batch_size": 101},
    ],
    ids=["padded", "microbatches", "mixed", "probed"],
)
def test_what_a_config_can_ask_for_is_the_same_in_two_processes(tmp_path, fields):
    fields = {**FIELDS, "train.num_steps": 7, **fields}
    found = ended(start(2, tmp_path / "two", fields))
    assert [code for code, _ in found] == [0, 0], found
    config = load_config("configs/digits.py", fields)
    train(config, tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one", config)


@pytest.mark.slow
def test_a_run_that_diverges_ends_in_all_processes_with_3(tmp_path):
    fields = {**FIELDS, "train.num_steps": 30, "optim.base_lr": 1e30, "train.max_nonfinite": 3}
    found = ended(start(2, tmp_path / "two", fields, source="configs/digits.py:norm=none"))
    assert [code for code, _ in found] == [3, 3], found
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["steps"] == result["diverged_step"] + 2


@pytest.mark.slow
def test_a_start_from_data_is_the_same_in_two_processes(tmp_path):
    fields = {**FIELDS, "train.num_steps": 4, "conv.data_dependent": True}
    source = "configs/digits.py:norm=none,conv=weight_norm"
    found = ended(start(2, tmp_path / "two", fields, source=source))
    assert [code for code, _ in found] == [0, 0], found
    config = load_config(source, fields)
    train(config, tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one", config, drawn=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel.mode": "pmap"}, "'parallel.mode' = 'pmap': several processes need 'jit'"),
        ({"parallel.num_devices": 1}, "= 1: the run's 2 processes use all of their 2 devices"),
    ],
)
def test_layouts_that_several_processes_cannot_have_are_refused(tmp_path, fields, message):
    found = ended(start(2, tmp_path / "run", {**FIELDS, "train.num_steps": 4, **fields}))
    assert [code for code, _ in found] == [2, 2]
    assert all(errors.count("\n") == 1 and message in errors for _, errors in found)


# Images that are decoded batch by batch


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Dark and light images of several sizes, 10 + 3 of each."""
    root, draw = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (draw.integers(10, 20), draw.integers(10, 20), 3)
                pixels = draw.integers(128 * label, 128 * label + 128, shape).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


STREAMED = {
    **FIELDS,
    "data.name": "squares",
    "data.source": "folder",
    "data.image_size": 8,
    "data.random_resized_crop": True,
    "data.flip": True,
    "train.batch_size": 8,
    "train.num_steps": 9,
}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_streamed_images_make_the_same_run_in_several_processes(tmp_path, squares, count, devices):
    fields = {**STREAMED, "data.path": str(squares)}
    found = ended(start(count, tmp_path / "several", fields, devices=devices))
    assert [code for code, _ in found] == [0] * count, found
    config = load_config("configs/digits.py", fields)
    train(config, tmp_path / "one")
    assert_same_run(tmp_path / "several", tmp_path / "one", config)


@pytest.mark.slow
def test_a_process_that_fails_alone_says_why_and_the_others_that_it_has_ended(tmp_path, squares):
    shutil.copytree(squares, tmp_path / "data")
    (tmp_path / "data/train/dark/3.png").write_bytes(b"no image")
    fields = {**STREAMED, "data.path": str(tmp_path / "data")}
    found = sorted(ended(start(2, tmp_path / "run", fields)))
    assert [code for code, _ in found] == [1, 2]
    assert "stops: another process has ended" in found[0][1]
    assert "train/dark/3.png' is in no format" in found[1][1]
    assert [errors.count("\n") for _, errors in found] == [1, 1]
    assert run.read_status(tmp_path / "run") in ("failed", "interrupted")


def shares(source, fields, count=2):
    """Returns what each of `count` processes of two devices reads (read_shard.py)."""
    program = [sys.executable, str(Path(__file__).with_name("read_shard.py")), source]
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [*program, json.dumps(fields), address, str(count), str(i)],
            env=environment(2),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_each_process_decodes_the_rows_of_its_devices_alone(squares):
    """Of two batches of 8 the first process has rows 0 to 3; 5 test images are padded to 8."""
    first, second = shares("configs/digits.py", {**STREAMED, "data.path": str(squares)})
    assert first["decoded"] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert second["decoded"] == [4, 5, 6, 7, 12, 13, 14, 15]
    assert first["tested_decoded"] == [0, 1, 2, 3]
    assert second["tested_decoded"] == [4]
    # Ten dark ones (0), then the light ones; of the test images three and three.
    assert [first["trained"], second["trained"]] == [[[0] * 4, [0, 0, 1, 1]], [[0] * 4, [1] * 4]]
    assert [first["tested"][:4], second["tested"][:1]] == [[0, 0, 0, 1], [1]]


@pytest.mark.slow
def test_each_of_several_devices_gets_its_own_rows_of_what_is_streamed(squares):
    """One process of two devices: all is decoded once, and no label is on both devices."""
    [only] = shares("configs/digits.py", {**STREAMED, "data.path": str(squares)}, count=1)
    assert only["decoded"] == list(range(16))
    assert only["trained"] == [[0] * 8, [0, 0, 1, 1, 1, 1, 1, 1]]
    assert only["tested"][:5] == [0, 0, 0, 1, 1]


@pytest.mark.slow
def test_of_data_in_memory_each_process_puts_its_rows_alone_on_its_devices():
    from normlab.data import load

    labels = load(load_config("configs/digits.py").data).train.labels.tolist()
    first, second = shares("configs/digits.py", {})
    assert first["trained"] == [labels[0:4], labels[8:12]]
    assert second["trained"] == [labels[4:8], labels[12:16]]

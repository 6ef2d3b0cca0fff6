"""Whole runs: resuming bit for bit, pairing, divergence, folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import SMALL, final_parameters, lines, small

from normlab import run
from normlab.config import load_config
from normlab.errors import UserError
from normlab.training import checkpoint
from normlab.training.evaluate import Evaluator
from normlab.training.loop import train
from normlab.training.restore import evaluate_run
from normlab.training.setup import run_identity
from normlab.training.signals import Interrupted

# What a run leaves


def test_a_run_folder_holds_what_the_run_was(finished):
    folder, result = finished
    assert json.loads((folder / "result.json").read_text()) == result
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    manifest = json.loads((folder / "manifest.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert config["norm"]["kind"] == "batch_norm"
    assert config["source"] == "configs/digits.py:norm=batch_norm"
    assert manifest["overrides"] == ["train.num_steps=12"]
    assert manifest["id"] == run_id_of(folder)
    assert {"git_commit", "versions", "devices", "threads", "environment"} <= manifest.keys()
    assert {"data_fingerprint", "data_order_hash", "init_hashes"} <= manifest.keys()
    assert manifest["steps_per_epoch"] == 22  # 1,437 images in full batches of 64
    assert result["steps"] == 12
    # conv 9·4 + norm 8 + conv 9·4·8 + norm 16 + head 8·10 + 10.
    assert result["num_params"] == 36 + 8 + 288 + 16 + 90


def run_id_of(folder):
    from normlab.config import from_json
    from normlab.training.setup import id_of

    return id_of(from_json(run.read_json(folder / "config.json")))


def test_lines_come_at_their_steps(finished):
    folder, result = finished
    found = [(line["step"], line["split"]) for line in lines(folder)]
    assert found == [(5, "train"), (6, "test"), (10, "train"), (12, "train"), (12, "test")]
    assert lines(folder)[-1]["accuracy"] == result["test_accuracy"]
    assert not any("seconds" in line for line in lines(folder))
    assert all(line["seconds"] > 0 for line in lines(folder, "timing.jsonl"))
    assert checkpoint.steps(folder / "checkpoints") == [4, 8, 12]


def test_a_finished_run_is_not_run_again(finished):
    folder, result = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}
    assert train(small(), folder) == result
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"}


# Resuming


def test_a_signal_during_the_last_evaluation_ends_the_run_at_once(finished, tmp_path, monkeypatch):
    folder, result = finished

    def interrupted(self, *_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("the evaluation went on")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "all_ways", interrupted)
        with pytest.raises(Interrupted, match=r"^stopped by SIGTERM at step 12; the same command"):
            train(small(), tmp_path)
    assert run.read_status(tmp_path) == "interrupted"
    assert train(small(), tmp_path)["test_loss"] == result["test_loss"]
    assert lines(tmp_path) == lines(folder)


@pytest.mark.faults
def test_a_run_cut_off_anywhere_ends_with_the_bytes_of_one_that_was_not(finished, tmp_path):
    folder, _ = finished

    class Cut(Exception):
        pass

    for number, cut_at in enumerate([(5, "train"), (6, "test"), (10, "train"), (12, "test")]):
        other = tmp_path / str(number)

        def cut(step, _total, line, at=cut_at):
            if line and (step, line["split"]) == at:
                raise Cut

        with pytest.raises(Cut):
            train(small(), other, progress=cut)
        assert json.loads((other / "status.json").read_text())["status"] == "failed"
        train(small(), other)
        assert (other / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
        assert final_parameters(other, small()) == final_parameters(folder, small())


@pytest.mark.faults
def test_sigkill_at_any_moment_loses_nothing(tmp_path):
    """The real thing: processes killed with SIGKILL, the same command given again."""
    fields = {"train.num_steps": 400, "checkpoint.every_steps": 20, "log.every_steps": 20}
    arguments = [f"--config.{name}={value}" for name, value in {**SMALL, **fields}.items()]

    def start(folder):
        command = [sys.executable, "-m", "normlab", "train", "--config=configs/digits.py"]
        environment = {**os.environ, "NPROC": "1"}
        return subprocess.Popen(
            [*command, f"--workdir={folder}", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
        )

    assert start(tmp_path / "whole").wait(120) == 0
    killed = 0
    for _ in range(10):
        process = start(tmp_path / "killed")
        checkpoints = tmp_path / "killed" / "checkpoints"
        there = len(checkpoint.steps(checkpoints))
        while process.poll() is None and len(checkpoint.steps(checkpoints)) < there + 5:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        if process.wait(60) == 0:
            break
    assert killed >= 2
    config = load_config("configs/digits.py", {**SMALL, **fields})
    assert final_parameters(tmp_path / "killed", config) == final_parameters(
        tmp_path / "whole", config
    )
    for name in ("metrics.jsonl", "config.json", "identity.json"):
        whole, resumed = (tmp_path / kind / name for kind in ("whole", "killed"))
        assert whole.read_bytes() == resumed.read_bytes(), name


def test_sigterm_saves_and_leaves_with_143(tmp_path):
    command = [sys.executable, "-m", "normlab", "train", "--config=configs/digits.py"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'run'}", "--config.train.num_steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()  # what it is
    process.stdout.readline()  # the first line of metrics: it trains
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.count("\n") == 1
    assert "stopped by SIGTERM at step" in errors
    assert run.read_status(tmp_path / "run") == "interrupted"
    assert len(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 1


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(finished, tmp_path):
    folder, _ = finished

    def cut(step, _total, line):
        if line and (step, line["split"]) == (10, "train"):
            raise KeyboardInterrupt

    other = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(small(), other, progress=cut)
    (other / "checkpoints" / "8" / "manifest.json").write_text("{}")
    train(small(), other)
    assert "resumed at step 4" in (other / "log.txt").read_text()
    assert (other / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_what_renormalization_does_is_logged_by_layer(tmp_path):
    ramps = {"norm.ramp_start_fraction": 0.5, "norm.d_ramp_end_fraction": 0.5}
    train(small("batch_renorm", **ramps, norm__r_ramp_end_fraction=0.5), tmp_path / "run")
    first, second, last = (line for line in lines(tmp_path / "run") if line["split"] == "layers")
    names = {f"{layer}/{name}" for layer in ("norm1", "norm2") for name in ("r", "d", "clipped")}
    assert set(first) == {"step", "split"} | names
    # Steps 1 to 5 are plain batch normalization: r = 1, d = 0, and all that is wanted is cut off.
    assert (first["norm1/r"], first["norm1/d"], first["norm1/clipped"]) == (1, 0, 1)
    # From the seventh on the limits are 3 and 5.
    assert second["norm1/r"] != 1
    assert 0 < last["norm1/d"] < 5
    assert last["norm1/clipped"] < 0.5


def test_a_normalizer_that_measures_nothing_logs_no_layers(finished):
    assert {line["split"] for line in lines(finished[0])} == {"train", "test"}


# Pairing


def test_variants_of_one_seed_share_order_data_and_common_initial_values(finished, tmp_path):
    ours = json.loads((finished[0] / "manifest.json").read_text())
    train(small("none", train__num_steps=1), tmp_path / "none")
    theirs = json.loads((tmp_path / "none" / "manifest.json").read_text())
    assert ours["data_order_hash"] == theirs["data_order_hash"]
    assert ours["data_fingerprint"] == theirs["data_fingerprint"]
    common = ours["init_hashes"].keys() & theirs["init_hashes"].keys()
    assert {"conv1/kernel", "conv2/kernel", "head/kernel"} <= common
    assert all(ours["init_hashes"][name] == theirs["init_hashes"][name] for name in common)
    train(small(seed=1, train__num_steps=1), tmp_path / "seed")
    other = json.loads((tmp_path / "seed" / "manifest.json").read_text())
    assert other["data_order_hash"] != ours["data_order_hash"]
    assert other["init_hashes"]["conv1/kernel"] != ours["init_hashes"]["conv1/kernel"]


def test_another_augmentation_or_seed_is_seen_in_the_manifest(finished, tmp_path):
    def hash_of(folder, **fields):
        train(small("layer_norm", **fields), folder)
        return json.loads((folder / "manifest.json").read_text())["augmentation_hash"]

    then = json.loads((finished[0] / "manifest.json").read_text())["augmentation_hash"]
    assert hash_of(tmp_path / "same") == then
    others = [
        hash_of(tmp_path / "crop", data__crop_padding=3),
        hash_of(tmp_path / "flip", data__flip=True),
        hash_of(tmp_path / "seed", seed=1),
    ]
    assert len({then, *others}) == 4


# Divergence


def test_a_diverged_run_says_what_and_when_and_is_not_run_again(tmp_path):
    config = small("none", optim__base_lr=1e30, train__num_steps=40)
    result = train(config, tmp_path / "run")
    assert result["status"] == "diverged"
    assert result["diverged_metric"] == "loss"
    assert result["diverged_step"] >= 2
    assert run.read_status(tmp_path / "run") == "diverged"
    message = json.loads((tmp_path / "run" / "status.json").read_text())["message"]
    assert "loss not finite from step" in message
    # It stopped at the tenth such step in a row, wherever the next line of the log was due.
    assert result["steps"] == result["diverged_step"] + 9
    assert lines(tmp_path / "run")[-1]["step"] == result["steps"]
    assert train(config, tmp_path / "run") == result
    # Its last good weights are kept, for `normlab eval`.
    metrics = evaluate_run(tmp_path / "run")
    assert metrics["test_accuracy"] == pytest.approx(result["test_accuracy"])


def test_a_duration_below_a_step_means_every_step(tmp_path):
    train(
        small(eval__every_steps=None, eval__every_epochs=0.01, train__num_steps=3), tmp_path / "run"
    )
    tested = [line["step"] for line in lines(tmp_path / "run") if line["split"] == "test"]
    assert tested == [1, 2, 3]


def test_a_folder_whose_run_was_refused_for_its_data_is_free(tmp_path):
    config = load_config("configs/mnist.py", {"data.path": str(tmp_path / "nothing")})
    run.open_folder(tmp_path / "run", run_identity(config))
    other = small()
    train(other, tmp_path / "run")
    assert run.read_status(tmp_path / "run") == "done"


def test_a_damaged_result_is_named_and_kept(tmp_path):
    train(small(), tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"result\.json has status None"):
        train(small(), tmp_path / "run")


def test_a_torn_line_of_a_log_does_not_stop_a_run(tmp_path):
    class Cut(Exception):
        pass

    def cut(step, _total, line):
        if line and (step, line["split"]) == (10, "train"):
            raise Cut

    with pytest.raises(Cut):
        train(small(), tmp_path / "run", progress=cut)
    timing = tmp_path / "run" / "timing.jsonl"
    timing.write_text("\x00\x00{torn\n" + timing.read_text())
    assert train(small(), tmp_path / "run")["status"] == "done"


# Folders


def test_a_folder_of_another_config_is_refused_and_left_alone(finished):
    folder, _ = finished
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match=r"optim\.base_lr is 0\.1 there and 0\.2 here"):
        train(small(optim__base_lr=0.2), folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_that_is_no_run_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis\.tex'"):
        train(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(small(), tmp_path / "file" / "run")


def test_two_processes_do_not_write_one_folder(tmp_path):
    with run.locked(tmp_path):
        assert run.is_locked(tmp_path)
        with (
            pytest.raises(UserError, match="being written by another process"),
            run.locked(tmp_path),
        ):
            pass
    assert not run.is_locked(tmp_path)


def test_a_run_whose_process_is_gone_is_interrupted(tmp_path):
    run.write_status(tmp_path, "running", 3)
    assert run.read_status(tmp_path) == "interrupted"
    with run.locked(tmp_path):
        assert run.read_status(tmp_path) == "running"


def test_groups_that_do_not_divide_are_settled_and_noted(tmp_path):
    train(small("group_norm", norm__num_groups=3, train__num_steps=1), tmp_path / "run")
    # Of 4 channels the largest divisor up to 3 is 2, of 8 likewise 2.
    log = Path(tmp_path / "run" / "log.txt").read_text()
    assert "norm1: num_groups 3 does not divide 4 channels: 2 groups" in log
    assert "norm2: num_groups 3 does not divide 8 channels: 2 groups" in log


@pytest.mark.parametrize(("field", "value"), [("widths", (0, 8)), ("strides", (-1, 2))])
def test_a_net_of_nothing_is_refused_before_the_run(field, value, tmp_path):
    config = small(**{f"model__{field}": value})
    with pytest.raises(UserError, match=rf"'model\.{field}' = .* must each be from 1"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_result_whose_accuracy_is_no_number_is_named_and_kept(tmp_path):
    train(small(), tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    path.write_text('{"status": "done", "test_accuracy": "x"}')
    with pytest.raises(UserError, match="test_accuracy 'x'"):
        train(small(), tmp_path / "run")
    assert "x" in path.read_text()

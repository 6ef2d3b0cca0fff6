"""Whole runs: resuming bit for bit, exact evaluation, pairing, divergence, folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from normlab import run
from normlab.config import load_config
from normlab.data import load
from normlab.errors import UserError
from normlab.training import checkpoint, parallel
from normlab.training.evaluate import Evaluator
from normlab.training.examples import Resident
from normlab.training.loop import train
from normlab.training.restore import evaluate_run, restore
from normlab.training.setup import build_parts, run_identity
from normlab.training.signals import Interrupted
from normlab.training.state import create_state

SMALL = {
    "model.widths": (4, 8),
    "model.strides": (2, 2),
    "train.num_steps": 12,
    "log.every_steps": 5,
    "eval.every_steps": 6,
    "checkpoint.every_steps": 4,
}


def small(norm="batch_norm", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(f"configs/digits.py:norm={norm}", SMALL | names)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def final_parameters(folder, config):
    state = create_state(build_parts(config), parallel.Compiler())
    step, state, _ = checkpoint.latest(folder / "checkpoints", state, {})
    return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


# What a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "bn"
    result = train(small(), folder, overrides={"train.num_steps": 12})
    return folder, result


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


# Evaluation


@pytest.fixture(scope="module")
def evaluator(finished):
    folder, _ = finished
    compiler = parallel.Compiler()
    parts, _, state = restore(folder, None, compiler)
    data = load(parts.config.data)
    mesh = parallel.make_mesh()
    examples = parallel.replicate((data.test.images, data.test.labels), mesh)
    train_examples = parallel.replicate((data.train.images, data.train.labels), mesh)
    made = Evaluator(parts.model, parts.info, mesh, compiler)
    return made, parts, state.variables(), train_examples, examples


def test_the_accuracy_is_the_same_for_any_batch_size(evaluator, finished):
    made, _, variables, _, examples = evaluator
    found = [made.running(variables, Resident(examples), size) for size in (1, 7, 128, 10_000)]
    assert {metrics["accuracy"] for metrics in found} == {finished[1]["test_accuracy"]}
    np.testing.assert_allclose([m["loss"] for m in found], found[0]["loss"], rtol=1e-5)


def test_the_accuracy_is_the_count_of_right_answers(evaluator):
    made, parts, variables, _, (images, labels) = evaluator
    mean, std = parts.info.mean[0], parts.info.std[0]
    inputs = (np.asarray(images, np.float32) / 255 - mean) / std
    logits = parts.model.apply(variables, inputs, train=False)
    expected = np.mean(np.argmax(np.asarray(logits), -1) == np.asarray(labels))
    got = made.running(variables, Resident((images, labels)), 100)["accuracy"]
    assert got == pytest.approx(expected, abs=1e-12)


def test_recomputed_statistics_are_the_training_sets_own(evaluator):
    """The first normalizer sees the convolution of the data alone: its exact moments are known."""
    made, parts, variables, (images, labels), _ = evaluator
    new = made.recompute(variables, Resident((images, labels)), 64)
    mean, std = parts.info.mean[0], parts.info.std[0]
    inputs = (np.asarray(images, np.float32) / 255 - mean) / std
    conv = parts.model.apply(
        variables, inputs, train=False, capture_intermediates=True, mutable=["intermediates"]
    )[1]["intermediates"]["conv1"]["__call__"][0]
    values = np.asarray(conv, np.float64).reshape(-1, conv.shape[-1])
    got = new["batch_stats"]["norm1"]
    np.testing.assert_allclose(got["mean"], values.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["var"], values.var(0), rtol=1e-4)
    # The running averages after twelve steps are something else.
    assert not np.allclose(variables["batch_stats"]["norm1"]["var"], values.var(0), rtol=1e-2)


@pytest.mark.parametrize("norm", ["batch_norm", "batch_renorm"])
def test_recomputed_statistics_do_not_depend_on_the_running_ones(norm):
    """Or a layer's moments would be those under statistics that are about to be replaced."""
    ramp = {f"norm.{name}_fraction": 0.0 for name in ("ramp_start", "r_ramp_end", "d_ramp_end")}
    parts = build_parts(small(norm, **(ramp if norm == "batch_renorm" else {})))
    compiler = parallel.Compiler()
    variables = create_state(parts, compiler).variables()
    data = load(parts.config.data)
    examples = jax.numpy.asarray(data.train.images), jax.numpy.asarray(data.train.labels)
    made = Evaluator(parts.model, parts.info, parallel.make_mesh(), compiler)
    other = variables | {"batch_stats": jax.tree.map(lambda x: 2 * x + 1, variables["batch_stats"])}
    found = [made.recompute(start, Resident(examples), 64) for start in (variables, other)]
    for layer in ("norm1", "norm2"):
        for name in ("mean", "var" if norm == "batch_norm" else "sigma"):
            a, b = (new["batch_stats"][layer][name] for new in found)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_run_with_validation_is_measured_on_images_it_never_trained_on(tmp_path):
    config = small(data__num_validation=137, train__num_steps=None, train__num_epochs=1)
    result = train(config, tmp_path / "run")
    # (1437 − 137) // 64 = 20 steps an epoch, where the whole set gives 22.
    assert result["steps"] == 20
    right = 137 * result["validation_accuracy"]
    assert right == pytest.approx(round(right), abs=1e-9)
    splits = [line["split"] for line in lines(tmp_path / "run") if line["step"] == 20]
    assert splits == ["train", "validation", "test"]
    assert "validation_accuracy_batch_statistics" not in result
    again = evaluate_run(tmp_path / "run")
    assert again["validation_accuracy"] == result["validation_accuracy"]
    assert "validation_accuracy" not in train(small(), tmp_path / "other")


def test_evaluating_a_finished_run_gives_its_result(finished):
    folder, result = finished
    again = evaluate_run(folder)
    for name in (
        "test_accuracy",
        "test_accuracy_batch_statistics",
        "test_accuracy_recomputed_statistics",
    ):
        assert again[name] == result[name], name
    assert evaluate_run(folder, step=4)["step"] == 4
    with pytest.raises(UserError, match="no checkpoint of step 5; nearest: 4"):
        evaluate_run(folder, step=5)
    with pytest.raises(UserError, match="kept no moving averages"):
        evaluate_run(folder, use_ema=True)


def test_a_stateless_normalizer_has_one_accuracy(tmp_path):
    result = train(small("layer_norm"), tmp_path / "run")
    assert "test_accuracy_batch_statistics" not in result


def test_moving_averages_are_evaluated_and_told_apart(tmp_path):
    result = train(small(train__ema_decay=0.5), tmp_path / "run")
    averaged, raw = (evaluate_run(tmp_path / "run", use_ema=ema) for ema in (True, False))
    assert averaged["test_loss"] == pytest.approx(result["test_loss"], rel=1e-6)
    assert averaged["test_loss"] != raw["test_loss"]


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

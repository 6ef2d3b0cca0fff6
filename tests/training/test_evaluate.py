"""Evaluation: exact counts, recomputed statistics, validation, any checkpoint of a run."""

import jax
import numpy as np
import pytest
from small_run import lines, small

from normlab.data import load
from normlab.errors import UserError
from normlab.training import parallel
from normlab.training.evaluate import Evaluator
from normlab.training.examples import Resident
from normlab.training.loop import train
from normlab.training.restore import evaluate_run, restore
from normlab.training.setup import build_parts
from normlab.training.state import create_state


@pytest.fixture(scope="module")
def evaluator(finished):
    folder, _ = finished
    compiler = parallel.Compiler()
    parts, _, state = restore(folder, None)
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

"""Every normalizer in a network: two steps that move each parameter, evaluation, a checkpoint."""

import jax
import numpy as np
import pytest

from normlab.config import load_config
from normlab.data import load
from normlab.norms import NORMS
from normlab.training import checkpoint, parallel
from normlab.training.evaluate import Evaluator
from normlab.training.examples import Resident
from normlab.training.setup import build_parts
from normlab.training.state import create_state
from normlab.training.step import make_train_step

FIELDS = {
    "train.batch_size": 8,
    "train.num_steps": 2,
    "optim.weight_decay": 0.0,  # so that a parameter moves by its gradient alone
    "optim.schedule": "constant",
}
SMALL = {
    "mlp": {"model.widths": (16,)},
    "cnn": {"model.widths": (8, 16), "model.strides": (2, 2)},
    "resnet20": {},
}
STILL = {
    # At one position there is nothing to normalize over: the output is the offset, whatever x is.
    ("instance_norm", "mlp"): {"dense1/kernel", "norm1/scale"},
}
"""Parameters that no gradient reaches, of a normalizer in a model."""


@pytest.fixture(scope="module")
def digits():
    data = load(load_config("configs/digits.py").data)
    mesh = parallel.make_mesh()
    train, test = (
        parallel.replicate((split.images[:count], split.labels[:count]), mesh)
        for split, count in ((data.train, 16), (data.test, 20))
    )
    return mesh, train, test


def paths(tree):
    """Arrays by path, "norm1/scale"."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(part.key for part in path): np.asarray(leaf) for path, leaf in flat}


def assert_trains(digits, folder, norm, model, conv="standard"):
    mesh, (images, labels), test = digits
    source = f"configs/digits.py:model={model},norm={norm},conv={conv}"
    parts = build_parts(load_config(source, FIELDS | SMALL[model]))
    compiler = parallel.Compiler()
    before = state = create_state(parts, compiler)
    quickly = {"xla_backend_optimization_level": 0}  # two steps are soon taken
    train_step = make_train_step(parts.model, parts.direction, parts.schedule)
    step = jax.jit(train_step, compiler_options=quickly)
    mean, std = (np.asarray(part, np.float32) for part in (parts.info.mean, parts.info.std))
    inputs = (np.asarray(images, np.float32) / 255 - mean) / std
    for rows in (slice(0, 8), slice(8, 16)):
        state = step(state, (inputs[rows], np.asarray(labels)[rows]))

    # A step with a gradient that is not finite would have been counted, and taken back.
    assert (int(state.totals.steps), int(state.totals.nonfinite)) == (2, 0)
    old, new = paths(before.params), paths(state.params)
    assert {name for name in new if np.array_equal(old[name], new[name])} == STILL.get(
        (norm, model), set()
    )
    old, new = paths(before.batch_stats), paths(state.batch_stats)
    assert all(not np.array_equal(old[name], new[name]) for name in new)

    evaluator = Evaluator(parts.model, parts.info, mesh, compiler)
    found = evaluator.running(state.variables(), Resident(test), 8)
    assert np.isfinite(found["loss"])
    assert found["accuracy"] * 20 == pytest.approx(round(found["accuracy"] * 20))
    path = checkpoint.save(folder, 2, state, {"run": norm})
    restored, _ = checkpoint.load(path, before, {"run": norm})
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert evaluator.running(restored.variables(), Resident(test), 8) == found


@pytest.mark.parametrize("norm", NORMS)
def test_in_an_mlp(digits, tmp_path, norm):
    assert_trains(digits, tmp_path, norm, "mlp")


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_in_a_cnn(digits, tmp_path, norm):
    assert_trains(digits, tmp_path, norm, "cnn")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "conv"),
    [
        ("batch_renorm", "standard"),
        ("iterative_norm", "standard"),
        ("online_norm", "standard"),
        ("group_norm", "weight_standardization"),
        ("switchable_norm", "standard"),
        ("evonorm_s0", "standard"),
        ("dyt", "standard"),
        ("mean_only_batch_norm", "weight_norm"),
        ("none", "scaled_weight_standardization"),
    ],
)
def test_one_of_each_family_in_a_residual_network(digits, tmp_path, norm, conv):
    assert_trains(digits, tmp_path, norm, "resnet20", conv)

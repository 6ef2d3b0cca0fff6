"""Gradients by depth: by hand, and against theory."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from normlab.analysis import gradients
from normlab.analysis.gradients import measure_gradients, output_shapes
from normlab.analysis.subject import fresh
from normlab.config import load_config
from normlab.errors import UserError
from normlab.models import MODELS
from normlab.models.layers import norm_layers
from normlab.training.probe import block_paths


def subject_of(choices, num_seeds=1, data="digits", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return fresh(load_config(f"configs/{data}.py:{choices}", names), num_seeds=num_seeds)


def growth(profile):
    return profile.summary["growth of the squared norm a place"]


def test_a_linear_networks_gradients_by_hand():
    """Of L = loss(h W₂ W₃): ∂L/∂(h W₂) = r W₃ᵀ and ∂L/∂h = r W₃ᵀ W₂ᵀ, r = (softmax − label)/B."""
    subject = subject_of("model=mlp,norm=none", model__widths=(8, 6), model__activation="identity")
    profile = measure_gradients(subject)
    [draw] = subject.draws()
    params = draw.variables["params"]
    kernels = [np.asarray(params[name]["kernel"], float) for name in ("dense1", "dense2", "head")]
    x = np.asarray(draw.images, np.float64).reshape(len(draw.images), -1)
    logits = np.exp(x @ kernels[0] @ kernels[1] @ kernels[2])
    r = (logits / logits.sum(1, keepdims=True) - np.eye(10)[draw.labels]) / len(x)
    expected = [r @ kernels[2].T @ kernels[1].T, r @ kernels[2].T]
    squares = [np.sum(g**2) for g in expected]
    assert profile.places == ("norm1", "norm2")
    np.testing.assert_allclose(profile.mean("squared_gradient_norm"), squares, rtol=1e-4)
    np.testing.assert_allclose(profile.mean("gradient_norm"), np.sqrt(squares), rtol=1e-4)
    assert profile.mean("growth")[0] == pytest.approx(squares[0] / squares[1], rel=1e-4)
    assert profile.mean("growth")[1] is None
    assert growth(profile) == pytest.approx(squares[0] / squares[1], rel=1e-4)
    assert not profile.predicted


def test_a_residual_network_goes_by_its_blocks():
    """Behind the last block: the mean over its 4 positions, and the head."""
    subject = subject_of("model=resnet20", model__stage_sizes=(1, 1, 1), train__batch_size=8)
    profile = measure_gradients(subject, objective="functional")
    assert profile.places == ("stage1_block1", "stage2_block1", "stage3_block1")
    [draw] = subject.draws()
    head = np.asarray(draw.variables["params"]["head"]["kernel"], np.float64)
    # E‖r Wᵀ‖² = B Σ W² for r ~ N(0, 1), spread over 4 positions: /4². r is drawn, so roughly.
    assert profile.mean("squared_gradient_norm")[-1] == pytest.approx(
        8 * np.sum(head**2) / 4, rel=0.5
    )
    layers = measure_gradients(subject, by="layers")
    assert layers.places[:3] == ("norm_stem", "stage1_block1/norm1", "stage1_block1/norm2")


FAMILIES = {cls.__module__: name for name, cls in reversed(MODELS.items())}.values()
"""The first model of each module."""
SHORT = {
    "nfnet_f0": {"model__stage_sizes": (1, 1), "model__widths": (256, 256)},
    "nf_regnet_b0": {"model__stage_sizes": (1, 1), "model__widths": (16, 24)},
    "wide_resnet": {"model__depth": 10, "model__widen_factor": 1},
    "vit_tiny": {"model__depth": 2},
    "deep_mlp": {"model__depth": 2},
}


@pytest.mark.parametrize("model", FAMILIES)
def test_every_place_of_every_family_has_a_gradient(model):
    fields = SHORT.get(model, {})
    if not fields and hasattr(MODELS[model], "stage_sizes"):
        fields = {"model__stage_sizes": (1, 1)}
    data = "mnist" if model == "lenet5" else "digits"
    subject = subject_of(f"model={model}", data=data, train__batch_size=4, **fields)
    parts = subject.parts
    blocks = block_paths(parts.model, parts.info.image_shape)
    norms = [layer.path for layer in norm_layers(parts.model, parts.info.image_shape)]
    for chosen, places in (("blocks", blocks), ("layers", norms)):
        if model == "vit_tiny" and chosen == "blocks":
            assert places == ["block1/1", "block1/2", "block2/1", "block2/2"]
            places = ["block1", "block2"]
        assert list(output_shapes(subject, chosen, train=True)) == places


@pytest.mark.slow
def test_a_transformer_has_a_gradient_for_each_block():
    fields = {"model__depth": 2, "model__width": 12, "train__batch_size": 4}
    profile = measure_gradients(subject_of("model=vit_tiny", **fields))
    assert profile.places == ("block1", "block2")
    assert all(square > 0 for square in profile.mean("squared_gradient_norm"))


def test_a_place_without_an_output_is_refused(monkeypatch):
    monkeypatch.setattr(gradients, "_layers", lambda subject: ["norm1", "norm9"])
    with pytest.raises(UserError, match="place 'norm9' has no output"):
        measure_gradients(subject_of("model=mlp"))


@pytest.mark.slow
def test_a_gradient_that_is_zero_everywhere_is_explained_by_a_head_of_zeros():
    small = {"model__stage_sizes": (1, 1), "model__width": 4, "train__batch_size": 4}
    zero = measure_gradients(subject_of("model=fixup_resnet20", **small))
    assert zero.summary["gradient"] == "zero everywhere: the head's weights are 0"
    assert zero.mean("growth") == [None, None]
    # Gains of 0 in the last normalizer let nothing through either, and the head is not zero.
    flat = subject_of("model=mlp,norm=none", model__widths=(4, 4), model__activation="relu")
    params = next(flat.draws()).variables["params"]
    dead = jax.tree.map(lambda x: x * 0, params) | {"head": params["head"]}
    profile = measure_gradients(dataclasses.replace(flat, variables={"params": dead}))
    assert profile.summary["gradient"] == "zero everywhere"
    assert "gradient" not in measure_gradients(flat).summary


def test_a_gradient_that_overflows_is_told_from_the_loss_on():
    """Kernels of 1e10 · identity: each layer's square is 1e20 times the next one's."""
    linear = subject_of(
        "model=mlp,norm=none", model__widths=(64,) * 5, model__activation="identity"
    )
    params = next(linear.draws()).variables["params"]
    kernels = {f"dense{i}": 1e10 * np.eye(64, dtype=np.float32) for i in (3, 4, 5)}
    kernels["dense1"] = params["dense1"]["kernel"] * 0  # or the logits would overflow
    large = {name: params[name] | {"kernel": kernel} for name, kernel in kernels.items()}
    variables = {"params": params | large}
    profile = measure_gradients(
        dataclasses.replace(linear, variables=variables), objective="functional"
    )
    squares = profile.mean("squared_gradient_norm")
    assert squares[:3] == [math.inf] * 3
    assert all(map(math.isfinite, squares[3:]))
    assert profile.summary["not finite"] == "from norm3 on, back to the input"
    assert profile.mean("growth")[2] == math.inf
    assert math.isnan(profile.mean("growth")[0])


def test_a_cell_of_a_loop_has_one_gradient():
    profile = measure_gradients(subject_of("model=rnn", model__widths=(8,)))
    assert "layer1/cell/norm_hidden" in profile.places
    assert all(square > 0 for square in profile.mean("squared_gradient_norm"))


@pytest.mark.parametrize(
    ("activation", "batch_size", "rel"), [("identity", 8, 0.03), ("relu", 256, 0.02)]
)
def test_gradients_grow_with_batch_norm_as_theory_has_it(activation, batch_size, rel):
    subject = subject_of(
        "model=mlp",
        num_seeds=4,
        model__widths=(256,) * 8,
        model__activation=activation,
        train__batch_size=batch_size,
    )
    profile = measure_gradients(subject, objective="functional")
    [expected] = (value for name, value in profile.summary.items() if "predicted" in name)
    assert growth(profile) == pytest.approx(expected, rel=rel)
    assert profile.predicted["growth"] == [expected] * 7 + [None]
    # From the last layer's measured square on.
    squares, line = (
        profile.mean("squared_gradient_norm"),
        profile.predicted["squared_gradient_norm"],
    )
    assert line[-1] == squares[-1]
    assert line[-3] == pytest.approx(squares[-1] * expected**2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "batch_size", "published"),
    [
        ("identity", 8, 1.204),
        ("identity", 16, 1.079),
        ("identity", 32, 1.031),
        ("relu", 8, 1.78),
        ("relu", 16, 1.58),
        ("relu", 32, 1.52),
        ("relu", 64, 1.49),
        ("relu", 256, 1.463),
        ("tanh", 256, 1.186),
    ],
)
def test_the_growth_of_24_layers_of_512(activation, batch_size, published):
    subject = subject_of(
        "model=mlp",
        num_seeds=5,
        model__widths=(512,) * 24,
        model__activation=activation,
        train__batch_size=batch_size,
    )
    profile = measure_gradients(subject, objective="functional")
    assert growth(profile) == pytest.approx(published, rel=0.02)


def test_an_objective_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="unknown objective 'los'; did you mean 'loss'"):
        measure_gradients(subject_of("model=mlp"), objective="los")

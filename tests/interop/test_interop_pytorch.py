"""PyTorch's states to and from ours, without PyTorch: names, layouts, settings, errors."""

import functools

import jax
import numpy as np
import pytest
from flax.core import FrozenDict

from normlab.errors import UserError
from normlab.interop import pytorch
from normlab.models.conv import StandardConv
from normlab.models.resnet import ResNet18, ResNet50
from normlab.norms import NORMS, BatchNorm, NormFactory

C = 3


def numbers(*shape):
    return np.arange(1.0, 1 + np.prod(shape), dtype="f4").reshape(shape)


def batch_norm():
    return {
        "weight": numbers(C),
        "bias": numbers(C) + 10,
        "running_mean": numbers(C) + 20,
        "running_var": numbers(C) + 30,
        "num_batches_tracked": np.array(5),
    }


def affine(*shape):
    return {"weight": numbers(*shape), "bias": -numbers(*shape)}


STATES = {
    "batch_norm": batch_norm(),
    "layer_norm": affine(C),
    "group_norm": affine(C),
    "instance_norm": affine(C),
    "rms_norm": {"weight": numbers(C)},
}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("kind", STATES)
def test_a_state_comes_back(kind):
    variables = pytorch.norm_variables(kind, STATES[kind])
    more = {"num_batches_tracked": 5} if kind == "batch_norm" else {}
    same(pytorch.norm_state(kind, variables, **more), STATES[kind])
    x = np.ones((2, 4, C), "f4")
    fields = {"num_groups": 1} if kind == "group_norm" else {}
    ours = NORMS[kind](**fields).init(jax.random.key(0), x, train=True)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, ours)


def test_a_converted_batch_norm_evaluates_as_its_state_says():
    # (x − mean)/√(var + ε)·weight + bias = (7 − 1)/√(3 + 1)·5 + 2 = 17.
    state = {"weight": [5.0], "bias": [2.0], "running_mean": [1.0], "running_var": [3.0]}
    state = {name: np.array(value, "f4") for name, value in state.items()}
    module = BatchNorm(**pytorch.norm_fields("batch_norm", {"eps": 1.0}))
    variables = pytorch.norm_variables("batch_norm", state)
    np.testing.assert_allclose(module.apply(variables, np.full((1, 1), 7, "f4"), train=False), 17)


def test_a_gain_per_element_has_its_channels_moved_last():
    state = affine(2, 3, 4)  # C, H, W
    scale = pytorch.norm_variables("layer_norm", state)["params"]["scale"]
    assert scale.shape == (3, 4, 2)
    assert scale[2, 1, 1] == state["weight"][1, 2, 1]
    same(pytorch.norm_state("layer_norm", pytorch.norm_variables("layer_norm", state)), state)


def test_no_array_is_shared():
    state = batch_norm()
    variables = pytorch.norm_variables("batch_norm", state)
    back = pytorch.norm_state("batch_norm", variables)
    for value in state.values():
        value += 1
    same(variables["batch_stats"], pytorch.norm_variables("batch_norm", back)["batch_stats"])
    assert variables["batch_stats"]["mean"][0] == 21


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.3, 0.0, 1.0])
def test_momentum_is_one_minus_ours_and_comes_back_exactly(momentum):
    fields = pytorch.norm_fields("batch_norm", {"momentum": momentum})
    np.testing.assert_allclose(fields["momentum"], 1 - momentum, rtol=1e-15)
    assert pytorch.norm_arguments("batch_norm", fields, (C,))["momentum"] == momentum


def test_settings_go_over_and_come_back():
    fields = pytorch.norm_fields("layer_norm", {"normalized_shape": (3, 4, 5), "bias": False})
    expected = {"axes": "all", "elementwise": True, "use_scale": True, "use_bias": False}
    assert fields == {**expected, "epsilon": 1e-5}
    arguments = pytorch.norm_arguments("layer_norm", fields, (4, 5, 3))
    assert arguments["normalized_shape"] == (3, 4, 5)
    assert pytorch.norm_fields("rms_norm", {"normalized_shape": 3})["epsilon"] == 2.0**-23
    assert not pytorch.norm_fields("instance_norm", {})["use_scale"]
    arguments = pytorch.norm_arguments("group_norm", {"group_size": 2}, (8,))
    assert arguments == {"num_groups": 4, "num_channels": 8, "eps": 1e-5, "affine": True}


# Layers ------------------------------------------------------------------------------------------


def test_a_kernel_is_transposed():
    weight = numbers(4, 3, 2, 5)  # O, I, H, W
    kernel = pytorch.layer_params({"weight": weight, "bias": numbers(4)})["kernel"]
    assert kernel.shape == (2, 5, 3, 4)
    assert kernel[1, 4, 2, 3] == weight[3, 2, 1, 4]
    np.testing.assert_array_equal(pytorch.layer_params({"weight": weight[:, :, 0, 0]})["kernel"],
                                  weight[:, :, 0, 0].T)  # fmt: skip


NAMINGS = {
    "weight_g": ("weight_g", "weight_v"),
    "parametrizations": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 5), (4, 3, 2, 2, 2)])
def test_weight_norm_has_either_naming_and_comes_back(naming, shape):
    gain, direction = NAMINGS[naming]
    state = {gain: numbers(4, *[1] * (len(shape) - 1)), direction: numbers(*shape)}
    state["bias"] = numbers(4)
    params = pytorch.layer_params(state)
    np.testing.assert_array_equal(params["gain"], numbers(4))
    assert params["kernel"].shape == (*shape[2:], 3, 4)
    same(pytorch.layer_state(params, naming), state)


# ResNets -----------------------------------------------------------------------------------------


@functools.cache
def small(bottleneck=False):
    """A ResNet of one block a stage, four channels wide, with its variables."""
    cls = ResNet50 if bottleneck else ResNet18
    model = cls(5, NormFactory(BatchNorm, FrozenDict()), StandardConv(), (1, 1, 1, 1), width=4)
    images = np.zeros((1, 32, 32, 3), "f4")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), shapes)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_resnet_comes_back_and_has_torchvisions_names(bottleneck):
    model, variables = small(bottleneck)
    state = pytorch.resnet_state(variables, model, num_batches_tracked=3)
    assert state["conv1.weight"].shape == (4, 3, 7, 7)
    assert state["fc.weight"].shape == (5, 128 if bottleneck else 32)
    last = "layer4.0.bn3" if bottleneck else "layer4.0.bn2"
    assert state[f"{last}.num_batches_tracked"] == 3
    assert state["layer2.0.downsample.0.weight"].ndim == 4
    assert "layer2.0.downsample.1.running_var" in state
    assert ("layer1.0.downsample.0.weight" in state) == bottleneck
    back = pytorch.resnet_variables(state, model)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


# Errors ------------------------------------------------------------------------------------------


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def resnet(change):
    model, variables = small()
    return pytorch.resnet_variables(change(pytorch.resnet_state(variables, model)), model)


def other_resnet(change):
    model, variables = small()
    return pytorch.resnet_state(change(variables), model)


ERRORS = {
    "missing": (
        lambda: pytorch.norm_variables("batch_norm", without(batch_norm(), "running_var")),
        "PyTorch's batch_norm lacks 'running_var'",
    ),
    "unknown": (
        lambda: pytorch.norm_variables("batch_norm", {**batch_norm(), "runing_var": 1}),
        "'runing_var'; did you mean 'running_var'?",
    ),
    "shape": (
        lambda: pytorch.norm_variables("batch_norm", {**batch_norm(), "running_var": numbers(4)}),
        r"'running_var' has shape \(4,\), unlike 'weight': \(3,\)",
    ),
    "not of channels": (
        lambda: pytorch.norm_variables("group_norm", affine(2, 3)),
        r"'weight' has shape \(2, 3\), not that of channels",
    ),
    "no place": (
        lambda: pytorch.norm_state("rms_norm", {"params": {"scale": numbers(3), "bias": 1}}),
        "rms_norm for PyTorch: 'bias'",
    ),
    "collection": (
        lambda: pytorch.norm_state("rms_norm", {"parms": {}}),
        "'parms'; did you mean 'params'?",
    ),
    "kind": (lambda: pytorch.norm_variables("bach_norm", {}), "did you mean 'batch_norm'?"),
    "plain mean": (
        lambda: pytorch.norm_fields("batch_norm", {"momentum": None}),
        "'momentum' = None, a plain mean, has no counterpart",
    ),
    "no averages": (
        lambda: pytorch.norm_fields("batch_norm", {"track_running_stats": False}),
        "'track_running_stats' = False has no counterpart in normlab; True has",
    ),
    "argument": (
        lambda: pytorch.norm_fields("batch_norm", {"epsilon": 1e-3}),
        "'epsilon' is not converted",
    ),
    "needed": (lambda: pytorch.norm_fields("group_norm", {}), "'num_groups' is missing"),
    "biased": (
        lambda: pytorch.norm_arguments("batch_norm", {}, (C,)),
        "'running_variance' = 'biased' has no counterpart in PyTorch; 'unbiased' has",
    ),
    "ghosts": (
        lambda: pytorch.norm_arguments(
            "batch_norm", {"running_variance": "unbiased", "stats_scope": "ghost"}, (C,)
        ),
        "'stats_scope' = 'ghost' has no counterpart in PyTorch; 'global' has",
    ),
    "per channel": (
        lambda: pytorch.norm_arguments("layer_norm", {}, (4, 4, C)),
        r"'elementwise' = False over 'all'.*GroupNorm\(1, C\) has",
    ),
    "bias alone": (
        lambda: pytorch.norm_arguments("group_norm", {"use_scale": False}, (C,)),
        "'use_bias' and no 'use_scale'",
    ),
    "gain": (
        lambda: pytorch.layer_params({"weight_g": numbers(), "weight_v": numbers(4, 3)}),
        r"'weight_g' has shape \(\), not \(4, 1\)",
    ),
    "half a weight norm": (
        lambda: pytorch.layer_params({"weight_v": numbers(4, 3)}),
        "lacks 'weight_g'",
    ),
    "naming": (
        lambda: pytorch.layer_state({"kernel": numbers(3, 4)}, "g"),
        "one of weight_g, parametrizations",
    ),
    "resnet lacks": (
        lambda: resnet(lambda state: without(state, "layer1.0.bn1.bias")),
        "lacks 'layer1.0.bn1.bias'",
    ),
    "resnet shape": (
        lambda: resnet(lambda state: {**state, "fc.weight": numbers(9, 32)}),
        r"'fc.weight' has shape \(9, 32\), not \(5, 32\)",
    ),
    "resnet too many": (
        lambda: resnet(lambda state: {**state, "layer1.1.conv1.weight": numbers(1)}),
        "'layer1.1.conv1.weight'; did you mean",
    ),
    "ours lacks": (
        lambda: other_resnet(lambda variables: {"params": variables["params"]}),
        "our ResNet lacks 'batch_stats/norm_stem/mean'",
    ),
    "ours too many": (
        lambda: other_resnet(lambda variables: {**variables, "more": {"x": numbers(1)}}),
        "unknown entry of our ResNet: 'more/x'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_one_line_that_names_it(name):
    call, expected = ERRORS[name]
    with pytest.raises(UserError, match=expected) as error:
        call()
    assert "\n" not in str(error.value)

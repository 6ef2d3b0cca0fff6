"""Folding: the same outputs without a normalizer, or a refusal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.core import FrozenDict

from normlab import analysis
from normlab.analysis.folding import fold, without_norm
from normlab.config import load_config
from normlab.errors import UserError
from normlab.models import build
from normlab.models.conv import StandardConv
from normlab.norms import NORMS, BatchNorm, NormFactory

FIXED = (
    "batch_norm",
    "batch_renorm",
    "cross_iteration_batch_norm",
    "l1_batch_norm",
    "mean_only_batch_norm",
    "batch_group_norm",
    "full_norm",
    "moving_average_batch_norm",
)
"""Normalizers that are a scale and a shift at inference."""

IMAGES = {"cnn": (8, 8, 1), "mlp": (8, 8, 1), "lenet5": (28, 28, 1)}


def config_of(model, norm="batch_norm", conv="standard", **overrides):
    data = {"cnn": "digits", "mlp": "digits", "lenet5": "mnist"}.get(model, "cifar10")
    settings = {name.replace("__", "."): value for name, value in overrides.items()}
    if model == "cnn":
        settings |= {"model.widths": (4, 6), "model.strides": (1, 2)}
    return load_config(f"configs/{data}.py:model={model},norm={norm},conv={conv}", settings)


def with_random_values(variables):
    """Returns the variables with every scale, bias and statistic drawn, none at its start."""
    flat = traverse_util.flatten_dict(variables)
    rng = np.random.default_rng(0)
    for path, array in flat.items():
        if path[-1] in ("var", "sigma", "second_moment", "scale"):
            flat[path] = jnp.asarray(rng.uniform(0.5, 2.0, array.shape), array.dtype)
        elif path[-1] in ("mean", "bias"):
            flat[path] = jnp.asarray(rng.normal(0, 0.5, array.shape), array.dtype)
    return traverse_util.unflatten_dict(flat)


def check(model, shape):
    """Asserts that the folded model computes the same to 1e-5, and returns its variables."""
    x = jax.random.normal(jax.random.key(1), (3, *shape))
    start = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(0, np.prod(s.shape[:-1]) ** -0.5, s.shape), s.dtype), start
    )
    variables = with_random_values(drawn)
    folded = fold(model, variables)
    expected = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    found = jax.jit(functools.partial(without_norm(model).apply, train=False))(folded, x)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 1e-5
    assert np.linalg.norm(expected) > 0
    return variables, folded


@pytest.mark.parametrize(
    ("model", "norm"),
    [
        *(("cnn", norm) for norm in FIXED),
        ("mlp", "batch_norm"),
        pytest.param("lenet5", "batch_norm", marks=pytest.mark.slow),
    ],
)
def test_small_models_compute_the_same_without_their_normalizer(model, norm):
    variables, folded = check(build(config_of(model, norm)), IMAGES[model])
    assert set(folded) == {"params"}
    assert not any("norm" in name for name in folded["params"])
    head = variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(folded["params"]["head"]["kernel"], head)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet20", "resnet18_cifar", "resnet18", "resnet50"])
def test_residual_networks_compute_the_same_without_their_normalizer(model):
    check(build(config_of(model)), (32, 32, 3))


@pytest.mark.slow
def test_projection_shortcuts_fold_too():
    check(build(config_of("resnet20", model__shortcut="B")), (32, 32, 3))


@pytest.mark.parametrize("conv", ["weight_norm", "weight_standardization"])
def test_weights_that_are_a_function_of_parameters_become_plain(conv):
    _, folded = check(build(config_of("cnn", conv=conv)), (8, 8, 1))
    assert set(folded["params"]["conv1"]) == {"kernel", "bias"}


def test_layers_that_an_override_left_without_a_normalizer_stay_as_they_are():
    model = build(config_of("cnn", norm_overrides="norm2=none"))
    variables, folded = check(model, (8, 8, 1))
    kernel = variables["params"]["conv2"]["kernel"]
    np.testing.assert_array_equal(folded["params"]["conv2"]["kernel"], kernel)


def test_one_layer_by_hand():
    # x·w with w = 3; mean 2, variance 4 − ε: σ = 2; scale 5, bias 1: y = 5(3x − 2)/2 + 1
    # = 7.5 x − 4, so that w' = 7.5 and b' = −4.
    class One(nn.Module):
        norm: NormFactory
        conv: StandardConv

        @nn.compact
        def __call__(self, x, *, train):
            use_bias = not self.norm.has_bias
            x = self.conv.dense(1, use_bias=use_bias, name="dense")(x.reshape(len(x), -1)[:, :1])
            return self.norm(name="norm")(x, train=train)

    model = One(NormFactory(BatchNorm, FrozenDict()), StandardConv())
    one = jnp.ones(1)
    variables = {
        "params": {"dense": {"kernel": 3 * one[None]}, "norm": {"scale": 5 * one, "bias": one}},
        "batch_stats": {"norm": {"mean": 2 * one, "var": (4 - 1e-5) * one}},
    }
    folded = fold(model, variables)["params"]["dense"]
    np.testing.assert_allclose(folded["kernel"], [[7.5]], rtol=1e-6)
    np.testing.assert_allclose(folded["bias"], [-4.0], rtol=1e-6)


class PreActivation(nn.Module):
    """norm, relu, conv, and the sum: as He et al. 2016b."""

    norm: NormFactory
    conv: StandardConv
    activated: bool

    @nn.compact
    def __call__(self, x, *, train):
        x = self.conv.conv(4, 3, name="conv1")(x)
        # At first the normalizer stands behind a convolution, whose output the shortcut takes too.
        y = self.norm(name="norm1")(nn.relu(x) if self.activated else x, train=train)
        return x + self.conv.conv(4, 3, name="conv2")(nn.relu(y))


@pytest.mark.parametrize("activated", [True, False])
def test_a_normalizer_elsewhere_than_behind_a_linear_layer_is_refused(activated):
    model = PreActivation(NormFactory(BatchNorm, FrozenDict()), StandardConv(), activated)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    with pytest.raises(UserError, match=r"cannot fold the normalizer 'norm1': it does not follow"):
        fold(model, variables)


class Tapped(nn.Module):
    """A linear layer and its normalizer; the layer's output is an output of the model, too."""

    norm: NormFactory
    conv: StandardConv

    @nn.compact
    def __call__(self, x, *, train):
        y = self.conv.dense(3, name="dense")(x.reshape(len(x), -1))
        return y, self.norm(name="norm")(y, train=train)


class LayerTwice(Tapped):
    """One layer called twice, one of the outputs normalized."""

    @nn.compact
    def __call__(self, x, *, train):
        x, dense = x.reshape(len(x), -1), self.conv.dense(3, name="dense")
        return self.norm(name="norm")(dense(x), train=train) + dense(2 * x)


class NormTwice(Tapped):
    """One normalizer behind two layers."""

    @nn.compact
    def __call__(self, x, *, train):
        x, norm = x.reshape(len(x), -1), self.norm(name="norm")
        layers = [self.conv.dense(3, name=name) for name in ("one", "two")]
        return sum(norm(layer(x), train=train) for layer in layers)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Tapped, "cannot fold the normalizer 'norm': it does not follow"),
        (LayerTwice, "cannot fold a model that calls 'dense' twice"),
        (NormTwice, "cannot fold a model that calls 'norm' twice"),
    ],
)
def test_what_has_another_use_or_is_used_twice_is_refused(model, reason):
    net = model(NormFactory(BatchNorm, FrozenDict()), StandardConv())
    variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    with pytest.raises(UserError, match=reason):
        fold(net, variables)


def refusal_of(config, shape=(8, 8, 1)):
    """Returns the line with which a model of ones is refused."""
    model = build(config)
    images = jnp.zeros((1, *shape))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    variables = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    with pytest.raises(UserError) as refused:
        fold(model, variables)
    return str(refused.value)


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"none", *FIXED}))
def test_every_other_normalizer_is_refused_in_a_line(norm):
    reason = "not a fixed scale and shift of each channel at inference"
    if NORMS[norm].replaces_activation:
        reason = "the activation, too"
    name = NORMS[norm].__name__
    expected = f"cannot fold the normalizer 'norm1': {name} is {reason}"
    assert refusal_of(config_of("cnn", norm)) == expected


@pytest.mark.parametrize(
    ("model", "norm", "field"),
    [
        ("cnn", "batch_norm", {"norm__inference_weight": 0.5}),
        ("mlp", "switchable_norm", {}),  # without positions it has other parameters
    ],
)
def test_fields_and_places_that_make_a_normalizer_look_at_the_example_are_seen(model, norm, field):
    assert "is not a fixed scale and shift" in refusal_of(config_of(model, norm, **field))


def test_a_clamp_that_only_large_values_reach_is_seen():
    """Under a variance of 10⁴, five deviations are 500: a value of 1 tells nothing of it."""
    model = build(config_of("cnn", "online_norm", norm__limit=5.0))
    start = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    stats = jax.tree.map(lambda a: jnp.full_like(a, 1e4), start["batch_stats"])
    with pytest.raises(UserError, match="OnlineNorm is not a fixed scale and shift"):
        fold(model, {**start, "batch_stats": stats})
    model = build(config_of("cnn", "online_norm", norm__control="none"))
    assert fold(model, {**start, "batch_stats": stats})


def test_the_function_is_found_under_the_name_of_the_package():
    assert analysis.fold is fold
    with pytest.raises(AttributeError, match="no attribute 'unfold'"):
        _ = analysis.unfold

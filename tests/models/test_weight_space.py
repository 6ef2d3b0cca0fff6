"""Weight-space layers: as layers in models, with their roles, start and filter gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from normlab import optim
from normlab.config import load_config
from normlab.models import CONVS, build, conv
from normlab.models.conv import StandardConv
from normlab.models.weight_space import START, WeightNorm
from normlab.norms.weight_standardization import standardized_weights

NEW = [name for name in CONVS if name != "standard"]
EVERY = pytest.mark.parametrize("kind", NEW)


def model_of(kind, model="cnn", norm="none", data="digits", **fields):
    overrides = {f"conv.{name}": value for name, value in fields.items()}
    if model == "cnn":
        overrides |= {"model.widths": (4, 6), "model.strides": (1, 2)}
    return build(load_config(f"configs/{data}.py:model={model},norm={norm},conv={kind}", overrides))


@functools.cache
def start(net):
    return jax.jit(lambda: net.init(jax.random.key(0), images(), train=False))()


def images(count=6):
    return jax.random.normal(jax.random.key(1), (count, 8, 8, 1))


@pytest.mark.parametrize(("size", "strides", "padding"), [(3, 1, None), (3, 2, 0), (1, 2, None)])
@EVERY
def test_a_convolution_is_the_plain_one_of_its_weights(kind, size, strides, padding):
    method, x = CONVS[kind](), jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    settings = {"strides": strides, "padding": padding, "use_bias": True, "name": None}
    layer = method.conv(5, size, **settings)
    params = layer.init(jax.random.key(1), x)["params"]
    params["bias"] = jnp.arange(5.0)
    plain = {"kernel": method.weights(params), "bias": params["bias"]}
    expected = StandardConv().conv(5, size, **settings).apply({"params": plain}, x)
    found = layer.apply({"params": params}, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", CONVS)
def test_a_grouped_convolution_is_a_convolution_of_each_part(kind):
    method, x = CONVS[kind](), jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    settings = {"strides": 2, "padding": "SAME", "use_bias": True, "name": None}
    layer = method.conv(6, 3, groups=2, **settings)
    params = layer.init(jax.random.key(1), x)["params"]
    assert params["kernel"].shape == (3, 3, 4, 6)
    params["bias"] = jnp.arange(6.0)
    part = method.conv(3, 3, **settings)
    halves = [
        part.apply({"params": {k: v[..., i : i + 3] for k, v in params.items()}}, inputs)
        for i, inputs in ((0, x[..., :4]), (3, x[..., 4:]))
    ]
    found = layer.apply({"params": params}, x)
    np.testing.assert_allclose(found, jnp.concatenate(halves, -1), atol=1e-5)
    # Each output has the variance of its own fan-in, 4·9, and not of 8·9.
    assert float(jnp.std(params["kernel"])) == pytest.approx(
        (1 if kind == "scaled_weight_standardization" else 2**0.5) / 6, rel=0.2
    )


@pytest.mark.parametrize("kind", CONVS)
def test_same_padding_is_xlas(kind):
    # At an even side and stride 2, XLA pads the end alone: the symmetric layer on an image moved
    # by a pixel.
    method, x = CONVS[kind](), jax.random.normal(jax.random.key(0), (1, 6, 6, 2))
    same, symmetric = (
        method.conv(3, 3, strides=2, padding=padding, name=None) for padding in ("SAME", None)
    )
    params = symmetric.init(jax.random.key(1), x)
    moved = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]
    inner = symmetric.apply(params, moved)[:, 1:, 1:]
    np.testing.assert_allclose(same.apply(params, x)[:, 1:, 1:], inner, atol=1e-5)


@EVERY
def test_a_dense_layer_is_the_plain_one_of_its_weights(kind):
    method, x = CONVS[kind](), jax.random.normal(jax.random.key(0), (2, 7))
    layer = method.dense(5, name=None)
    params = layer.init(jax.random.key(1), x)["params"]
    expected = x @ method.weights(params) + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-6)


def test_weight_norm_starts_as_the_plain_network_of_its_seed():
    x = images()
    plain, wn = model_of("standard"), model_of("weight_norm")
    there, here = start(plain), start(wn)
    assert set(here["params"]["conv1"]) == {"kernel", "gain", "bias"}
    np.testing.assert_array_equal(
        here["params"]["conv1"]["kernel"], there["params"]["conv1"]["kernel"]
    )
    found, expected = (n.apply(v, x, train=False) for n, v in ((wn, here), (plain, there)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["weight_standardization", "scaled_weight_standardization"])
def test_the_head_is_plain_and_hidden_layers_are_not(kind):
    x = images()
    net = model_of(kind, norm="batch_norm")
    variables = start(net)
    before = net.apply(variables, x, train=False)
    head = variables["params"]["head"]
    assert set(head) == {"kernel", "bias"}
    hidden = variables["params"]["conv2"]
    doubled = {"head": {**head, "kernel": 2 * head["kernel"]}}
    scaled = {"conv2": {**hidden, "kernel": 2 * hidden["kernel"]}}

    def logits(changed):
        params = {**variables["params"], **changed}
        return net.apply({**variables, "params": params}, x, train=False)

    np.testing.assert_allclose(logits(doubled), 2 * before, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits(scaled), before, rtol=1e-3, atol=1e-4)


@EVERY
def test_gains_are_no_kernels(kind):
    net = model_of(kind)
    roles = optim.roles(start(net)["params"])
    assert roles["conv1"]["kernel"] == "kernel"
    assert roles["conv1"]["bias"] == "bias"
    without = ("weight_standardization", "weight_centering")
    assert roles["conv1"].get("gain") == (None if kind in without else "norm_scale")


def test_the_data_dependent_start_gives_every_layer_mean_0_and_variance_1():
    net, x = model_of("weight_norm", data_dependent=True), images(32)
    variables = start(net)
    _, sown = net.apply(variables, x, train=True, mutable=[START])
    flat = traverse_util.flatten_dict(variables["params"])
    params = traverse_util.unflatten_dict(flat | traverse_util.flatten_dict(sown[START]))
    _, seen = net.apply({"params": params}, x, train=True, capture_intermediates=True)
    for name in ("conv1", "conv2", "head"):
        y = seen["intermediates"][name]["__call__"][0]
        axes = tuple(range(y.ndim - 1))
        np.testing.assert_allclose(y.mean(axes), np.zeros(y.shape[-1]), atol=1e-4)
        np.testing.assert_allclose(y.var(axes), np.ones(y.shape[-1]), rtol=1e-3)
    # And without it they are not.
    _, seen = net.apply(variables, x, train=True, capture_intermediates=True)
    y = seen["intermediates"]["conv2"]["__call__"][0]
    assert float(jnp.abs(y.var((0, 1, 2)) - 1).max()) > 0.1


def test_only_weight_norm_that_asks_for_it_starts_from_data():
    assert WeightNorm(data_dependent=True).starts_from_data
    assert not any(cls().starts_from_data for cls in CONVS.values())


@EVERY
def test_the_split_filter_gradient_goes_through(kind, monkeypatch):
    monkeypatch.setattr(conv, "_PIECE_BYTES", 2 * 6 * 6 * 3 * 4)
    x = jax.random.normal(jax.random.key(0), (8, 6, 6, 3))

    def gradient(choice):
        layer = CONVS[kind](filter_gradient=choice).conv(4, 3, name=None)
        params = layer.init(jax.random.key(1), x)["params"]

        def loss(params):
            return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        return jax.jit(jax.grad(loss))(params), text.count("conv_general_dilated[")

    (split, many), (whole, few) = gradient("split"), gradient("whole")
    assert many > few
    for name in whole:
        np.testing.assert_allclose(split[name], whole[name], rtol=1e-3, atol=1e-4)


@EVERY
def test_bfloat16_computes_in_bfloat16_from_float32_statistics(kind):
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3), jnp.bfloat16)
    layer = CONVS[kind]().conv(5, 3, name=None, dtype="bfloat16")
    params = layer.init(jax.random.key(1), x)["params"]
    y = layer.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    exact = CONVS[kind]().conv(5, 3, name=None).apply({"params": params}, x.astype("float32"))
    error = jnp.linalg.norm(y.astype("float32") - exact) / jnp.linalg.norm(exact)
    assert float(error) < 0.02


def test_the_config_reaches_the_weights():
    params = start(model_of("weight_standardization"))["params"]["conv2"]
    for variance in ("biased", "unbiased"):
        method = model_of("weight_standardization", variance=variance, epsilon=0.5).conv
        np.testing.assert_allclose(
            method.weights(params), standardized_weights(params["kernel"], variance, 0.5)
        )

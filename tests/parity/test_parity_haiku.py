"""dm-haiku: its normalizers, and where they depart from ours."""

import inspect

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest

hk = pytest.importorskip("haiku", reason="parity: dm-haiku is not installed")

from normlab.interop import haiku  # noqa: E402
from normlab.norms import NORMS, BatchNorm  # noqa: E402

pytestmark = pytest.mark.parity

C = 6
CLASSES = {
    "batch_norm": hk.BatchNorm,
    "layer_norm": hk.LayerNorm,
    "group_norm": hk.GroupNorm,
    "instance_norm": hk.InstanceNorm,
    "rms_norm": hk.RMSNorm,
}


class Layer:
    """A module of Haiku, as `agreement` wants it."""

    def __init__(self, kind, arguments, rank):
        self.kind, self.rank, self.decay_rate = kind, rank, arguments.get("decay_rate")

        def call(x, train):
            mode = {"is_training": train} if kind == "batch_norm" else {}
            return CLASSES[kind](**arguments, name="layer")(x, **mode)

        self.call = hk.without_apply_rng(hk.transform_with_state(call))
        self.forward_and_back = jax.jit(self._forward_and_back, static_argnames="train")

    def load(self, variables):
        options = {"rank": self.rank, "decay_rate": self.decay_rate}
        self.trees = haiku.norm_state(self.kind, variables, name="layer", **options)

    def variables(self):
        return haiku.norm_variables(self.kind, *self.trees, name="layer")

    def run(self, x, weight, train):
        y, gradients, x_gradient, state = self.forward_and_back(*self.trees, x, weight, train)
        self.trees = (self.trees[0], jax.tree.map(np.asarray, state))
        converted = haiku.norm_variables(self.kind, gradients, state, name="layer")
        return y, x_gradient, converted.get("params", {})

    def _forward_and_back(self, params, state, x, weight, train):
        def forward(params, x):
            return self.call.apply(params, state, x, train)

        y, back, after = jax.vjp(forward, params, x, has_aux=True)
        return y, *back(weight), after


BATCH = {"create_scale": True, "create_offset": True, "decay_rate": 0.7}
BOTH = {"create_scale": True, "create_offset": True}


def cases():
    for shape in agreement.SHAPES.values():
        rank = len(shape)
        yield "batch_norm", {**BATCH, "eps": 0.05}, shape
        yield "group_norm", {"groups": 3, "eps": 0.05}, shape
        if rank > 2:
            yield "instance_norm", {**BOTH, "eps": 0.05}, shape
        everything = tuple(range(-rank + 1, 0))
        for axes in {
            "channel": {"axis": (-1,), "param_axis": (-1,)},
            "all": {"axis": everything, "param_axis": (-1,)},
            "elements": {"axis": everything, "param_axis": everything},
        }.values():
            if rank > 2 or axes["axis"] == (-1,):
                yield "layer_norm", {**BOTH, **axes, "eps": 0.05}, shape
                yield "rms_norm", {**axes, "eps": 0.05}, shape
    shape = agreement.SHAPES[3]
    yield "group_norm", {"groups": 1, "create_offset": False}, shape
    yield "batch_norm", {**BATCH, "create_scale": False}, shape
    yield "batch_norm", {**BATCH, "create_scale": False, "create_offset": False}, shape
    yield "layer_norm", {"axis": (-1,), "create_scale": False, "create_offset": True}, shape
    yield "instance_norm", {"create_scale": False, "create_offset": False}, shape
    yield "rms_norm", {"axis": (-1,), "create_scale": False}, shape


@pytest.mark.parametrize(("kind", "arguments", "shape"), list(cases()))
def test_a_layer_and_ours_agree(kind, arguments, shape):
    layer = Layer(kind, arguments, len(shape))
    agreement.assert_agrees(NORMS[kind](**haiku.norm_fields(kind, arguments)), layer, shape)
    agreement.assert_argument_round_trip(haiku, kind, arguments, shape)
    params, state = layer.trees
    layer.load(layer.variables())
    agreement.assert_same(layer.trees[0], params)
    for module, entries in state.items():
        for name, value in entries.items():
            # `hidden` is made anew from the average: of 1 − decayᵗ float32 keeps some five digits.
            compare = np.testing.assert_array_equal
            if name == "hidden":
                compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)  # noqa: E731
            compare(layer.trees[1][module][name], value)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_defaults_are_those_of_the_installed_version(kind):
    theirs = inspect.signature(CLASSES[kind]).parameters
    for name, default in haiku.DEFAULTS[kind].items():
        if kind not in ("batch_norm", "layer_norm", "instance_norm") or "create" not in name:
            assert theirs[name].default == default


def test_a_network_that_is_only_initialized_is_converted():
    """Its average is the first batch's, with a counter of 0: the first update forgets it."""
    x = agreement.batches((4, 5, C))
    layer = Layer("batch_norm", BATCH, rank=3)
    layer.trees = layer.call.init(None, x[0], True)
    module, variables = BatchNorm(momentum=0.7, zero_debias=True), layer.variables()
    assert int(variables["batch_stats"]["step"]) == 0
    np.testing.assert_allclose(variables["batch_stats"]["mean"], x[0].mean((0, 1)), atol=1e-6)
    for batch in x:
        layer.run(batch, batch, train=True)
        *_, variables = agreement.run(module, variables, batch, batch, train=True)
        agreement.assert_close(variables, layer.variables(), 5e-5)


# Departures --------------------------------------------------------------------------------------


def test_at_a_mean_of_1000_their_variance_is_a_multiple_of_a_sixteenth():
    """It is E[x²] − E[x]², as the fast one of Flax, and may be below zero: then the output is NaN.

    Both lie in [2¹⁹, 2²⁰), where float32 has steps of 2⁻⁴; the true variance is 0.01.
    """
    noise = np.random.default_rng(0).normal(size=(1024, 1))
    x = (1000 + 0.1 * (noise - noise.mean()) / noise.std()).astype("f4")
    arguments = {**BATCH, "decay_rate": 0.0}
    layer = Layer("batch_norm", arguments, rank=2)
    params, state = layer.call.init(None, x, True)
    _, state = layer.call.apply(params, state, x, True)  # operation by operation, nothing fused
    var = float(state["layer/~/var_ema"]["average"].reshape(()))
    assert var * 16 == round(var * 16)
    module = BatchNorm(**haiku.norm_fields("batch_norm", arguments))
    variables = module.init(jax.random.key(0), x, train=True)
    _, after = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(after["batch_stats"]["var"], 0.01, rtol=2e-2)


def test_their_statistics_have_the_precision_of_the_input():
    """±1 around 100 in bfloat16: E[x²] = 10,001 lies where its steps are 64, and so does E[x]²."""
    x = jnp.array([[99.0], [101.0]] * 4, jnp.bfloat16)
    layer = Layer("batch_norm", {**BATCH, "decay_rate": 0.0}, rank=2)
    params, state = layer.call.init(None, x, True)
    _, state = layer.call.apply(params, state, x, True)
    assert float(state["layer/~/var_ema"]["average"].reshape(())) % 64 == 0
    module = BatchNorm(momentum=0.0)
    variables = module.init(jax.random.key(0), x, train=True)
    _, after = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(after["batch_stats"]["var"], 1, rtol=1e-5)


def test_without_the_debiased_average_ours_is_another_number():
    # After one step with decay 0.9, from 0: theirs is the mean, 5; the plain average a tenth of it.
    x = np.full((2, 1), 5.0, "f4")
    layer = Layer("batch_norm", {**BATCH, "decay_rate": 0.9}, rank=2)
    layer.trees = layer.call.init(None, x, True)
    layer.run(x, x, train=True)
    np.testing.assert_allclose(layer.variables()["batch_stats"]["mean"], 5, rtol=1e-5)
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    _, after = BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(after["batch_stats"]["mean"], 0.5, rtol=1e-5)

"""Keras 3 on JAX: its normalization layers, and where they depart from ours."""

import inspect

import agreement
import jax
import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="parity: Keras is not installed")

from normlab.interop import keras as converters  # noqa: E402
from normlab.norms import NORMS, BatchNorm, BatchRenorm, LayerNorm  # noqa: E402

pytestmark = pytest.mark.parity

C = 6
CLASSES = {
    "batch_norm": keras.layers.BatchNormalization,
    "batch_renorm": keras.layers.BatchNormalization,
    "layer_norm": keras.layers.LayerNormalization,
    "group_norm": keras.layers.GroupNormalization,
    "instance_norm": keras.layers.GroupNormalization,
    "rms_norm": keras.layers.RMSNormalization,
}


class Layer:
    """A layer of Keras, as `agreement` wants it."""

    def __init__(self, kind, arguments, shape):
        self.kind, self.layer = kind, CLASSES[kind](**arguments)
        self.layer.build(shape)
        self.forward_and_back = jax.jit(self._forward_and_back, static_argnames="train")
        self.options = {}
        if kind == "batch_renorm":
            self.options = {"epsilon": self.layer.epsilon}

    @property
    def weights(self):
        return {weight.name: np.asarray(weight.value) for weight in self.layer.weights}

    def load(self, variables):
        state = converters.norm_state(self.kind, variables, **self.options)
        self.step = variables.get("batch_stats", {}).get("step")  # Keras does not count
        assert set(state) == set(self.weights)
        for weight in self.layer.weights:
            weight.assign(state[weight.name])

    def variables(self):
        variables = converters.norm_variables(self.kind, self.weights)
        if self.kind == "batch_renorm":
            variables["batch_stats"]["step"] = self.step
        return variables

    def run(self, x, weight, train, **mask):
        trainable = [w.value for w in self.layer.trainable_variables]
        fixed = [w.value for w in self.layer.non_trainable_variables]
        y, gradients, x_gradient, after = self.forward_and_back(
            trainable, fixed, x, weight, train, **mask
        )
        for variable, value in zip(self.layer.non_trainable_variables, after, strict=True):
            variable.assign(value)
        if train and self.kind == "batch_renorm":
            self.step = np.array(self.step + 1, "i4")
        names = [w.name for w in self.layer.trainable_variables]
        with_gradients = self.weights | dict(zip(names, gradients, strict=True))
        converted = converters.norm_variables(self.kind, with_gradients)
        return y, x_gradient, converted.get("params", {})

    def _forward_and_back(self, trainable, fixed, x, weight, train, **mask):
        mode = {"training": train} if self.kind.startswith("batch") else {}

        def forward(trainable, x):
            return self.layer.stateless_call(trainable, fixed, x, **mode, **mask)

        y, back, after = jax.vjp(forward, trainable, x, has_aux=True)
        return y, *back(weight), after


RENORM = {"renorm": True, "momentum": 0.7, "renorm_momentum": 0.7}
CLIPPED = {"rmax": 1.25, "rmin": 0.8, "dmax": 0.5}


def cases():
    for shape in agreement.SHAPES.values():
        rank = len(shape)
        yield "batch_norm", {"momentum": 0.7, "epsilon": 0.05}, shape
        yield "batch_renorm", {**RENORM, "epsilon": 0.05, "renorm_clipping": CLIPPED}, shape
        yield "group_norm", {"groups": 3, "epsilon": 0.05}, shape
        if rank > 2:
            yield "instance_norm", {"groups": -1, "epsilon": 0.05}, shape
        everything = list(range(-rank + 1, 0))
        for axis in (-1, everything) if rank > 2 else (-1,):
            yield "layer_norm", {"axis": axis, "epsilon": 0.05}, shape
            yield "rms_norm", {"axis": axis, "epsilon": 0.05}, shape
    shape = agreement.SHAPES[3]
    yield "batch_renorm", RENORM, shape
    for kind in ("batch_norm", "layer_norm"):
        yield kind, {}, shape
        yield kind, {"scale": False}, shape
        yield kind, {"center": False}, shape
    yield "group_norm", {"groups": 1, "scale": False, "center": False}, shape


@pytest.mark.parametrize(("kind", "arguments", "shape"), list(cases()))
def test_a_layer_and_ours_agree(kind, arguments, shape):
    layer = Layer(kind, arguments, shape)
    module = NORMS[kind](**converters.norm_fields(kind, arguments))
    agreement.assert_agrees(module, layer, shape)
    given = {name: value for name, value in arguments.items() if name != "renorm_clipping"}
    agreement.assert_argument_round_trip(converters, kind, given, shape)
    state = converters.norm_state(kind, layer.variables(), **layer.options)
    if kind == "batch_renorm":  # derived, and to rounding: XLA may take σ² − ε in one operation
        var = state.pop("moving_variance")
        np.testing.assert_allclose(var, layer.weights["moving_variance"], rtol=1e-4)
    agreement.assert_same(state, {name: layer.weights[name] for name in state})


@pytest.mark.parametrize("kind", CLASSES)
def test_the_defaults_are_those_of_the_installed_version(kind):
    theirs = inspect.signature(CLASSES[kind]).parameters
    for name, default in converters.DEFAULTS[kind].items():
        assert theirs[name].default == default


def test_renorm_clips_and_its_clipping_comes_back():
    fields = {"r_max": 1.25, "d_max": 0.5, "ramp_start_steps": 0}
    fields |= {"r_ramp_end_steps": 0, "d_ramp_end_steps": 0}
    arguments = converters.norm_arguments("batch_renorm", fields, (C,))
    assert arguments["renorm_clipping"] == CLIPPED
    back = converters.norm_fields("batch_renorm", arguments)
    assert {name: back[name] for name in fields} == fields
    # With wide limits the same batch gives another output: the limits are at work above.
    x = agreement.batches((8, C), count=1)[0]
    outputs = []
    for clipping in (CLIPPED, None):
        arguments = {**RENORM, "renorm_clipping": clipping}
        layer = Layer("batch_renorm", arguments, x.shape)
        layer.load(agreement.start(BatchRenorm(), x))
        outputs.append(layer.run(x, x, train=True)[0])
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1


@pytest.mark.parametrize("shape", agreement.SHAPES.values())
def test_masked_batches_agree(shape):
    mask = np.random.default_rng(0).uniform(size=shape[:-1]) < 0.7
    mask.reshape(-1)[0] = True
    x = agreement.batches(shape, count=1)[0]
    module = BatchNorm(**converters.norm_fields("batch_norm", {"momentum": 0.7}))
    variables = agreement.start(module, x)
    layer = Layer("batch_norm", {"momentum": 0.7}, shape)
    layer.load(variables)
    y, *_ = layer.run(x, x, train=True, mask=mask)
    found, after = module.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
    agreement.assert_close(found, y, 5e-5)
    agreement.assert_close(after, {"batch_stats": layer.variables()["batch_stats"]}, 5e-5)


# Departures --------------------------------------------------------------------------------------


def test_their_default_epsilon_is_a_hundred_times_ours():
    # A variance of 1e-3: ours divides by √1.01e-3, theirs by √2e-3.
    x = (np.array([[1.0, -1.0]]) * np.sqrt(1e-3)).astype("f4")
    ours, _ = LayerNorm().init_with_output(jax.random.key(0), x, train=True)
    theirs, *_ = Layer("layer_norm", {}, x.shape).run(x, x, train=True)
    np.testing.assert_allclose(theirs / ours, np.full((1, 2), np.sqrt(1.01 / 2)), rtol=1e-4)


def test_a_batch_of_nothing_draws_their_averages_to_zero_and_leaves_ours():
    x, mask = np.ones((4, C), "f4"), np.zeros(4, bool)
    module = BatchNorm(**converters.norm_fields("batch_norm", {"momentum": 0.7}))
    variables = agreement.start(module, x)
    layer = Layer("batch_norm", {"momentum": 0.7}, x.shape)
    layer.load(variables)
    layer.run(x, x, train=True, mask=mask)
    before = variables["batch_stats"]
    for name, value in layer.variables()["batch_stats"].items():
        np.testing.assert_allclose(value, 0.7 * before[name], rtol=1e-6)
    _, after = module.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
    agreement.assert_same(after["batch_stats"], before)


def test_before_any_update_their_renorm_evaluates_by_the_root_of_one_plus_epsilon():
    # moving_variance starts at 1 and not at σ² − ε, so they divide by √(1 + 0.21) = 1.1; ours by 1.
    x = np.full((2, C), 3.3, "f4")
    layer = Layer("batch_renorm", {**RENORM, "epsilon": 0.21}, x.shape)
    layer.step = np.zeros((), "i4")
    module = BatchRenorm(**converters.norm_fields("batch_renorm", {**RENORM, "epsilon": 0.21}))
    variables = layer.variables()
    ours = module.apply(variables, x, train=False)
    np.testing.assert_allclose(ours, 3.3, rtol=1e-6)
    np.testing.assert_allclose(layer.run(x, x, train=False)[0], 3.0, rtol=1e-6)


def test_in_half_precision_their_layer_has_the_rounding_of_float32():
    """As ours: both take statistics in float32 and round the output alone."""
    x = (agreement.batches((4, 5, C), count=1)[0] + 20).astype("f2")
    ours, _ = LayerNorm(axes="channel", epsilon=1e-3).init_with_output(
        jax.random.key(0), x, train=True
    )
    theirs, *_ = Layer("layer_norm", {"dtype": "float16"}, x.shape).run(x, x, train=True)
    exact = x.astype("f8") - x.astype("f8").mean(-1, keepdims=True)
    exact = exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-3)
    for y in (ours, theirs):
        assert y.dtype == np.float16
        np.testing.assert_allclose(np.asarray(y, "f8"), exact, rtol=1e-3, atol=1e-3)

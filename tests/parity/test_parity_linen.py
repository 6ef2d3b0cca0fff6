"""flax.linen: its own normalizers, and where they depart from ours."""

import inspect

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from normlab.interop import linen
from normlab.models.weight_space import WeightNorm
from normlab.norms import NORMS, BatchNorm

pytestmark = pytest.mark.parity

C = 6
CLASSES = {
    "batch_norm": nn.BatchNorm,
    "layer_norm": nn.LayerNorm,
    "group_norm": nn.GroupNorm,
    "instance_norm": nn.InstanceNorm,
    "rms_norm": nn.RMSNorm,
}


class Layer:
    """A module of linen, as `agreement` wants it."""

    def __init__(self, kind, module):
        self.kind, self.module = kind, module
        self.forward_and_back = jax.jit(self._forward_and_back, static_argnames="train")

    def load(self, variables):
        self.state = linen.norm_state(self.kind, variables)

    def variables(self):
        return linen.norm_variables(self.kind, self.state)

    def run(self, x, weight, train):
        y, gradients, x_gradient, updated = self.forward_and_back(self.state, x, weight, train)
        self.state = jax.tree.map(np.asarray, {**self.state, **updated})
        return y, x_gradient, gradients

    def _forward_and_back(self, state, x, weight, train):
        mode = {"use_running_average": not train} if self.kind == "batch_norm" else {}

        def forward(params, x):
            together = {**state, "params": params}
            return self.module.apply(together, x, **mode, mutable=["batch_stats"])

        y, back, updated = jax.vjp(forward, state.get("params", {}), x, has_aux=True)
        return y, *back(weight), updated


def cases():
    for shape in agreement.SHAPES.values():
        rank = len(shape)
        yield "batch_norm", {"momentum": 0.7, "epsilon": 0.05}, shape
        yield "group_norm", {"num_groups": 3, "epsilon": 0.05}, shape
        if rank > 2:
            yield "instance_norm", {"epsilon": 0.05}, shape
        everything = tuple(range(-rank + 1, 0))
        for axes in {
            "channel": {"reduction_axes": (-1,), "feature_axes": (-1,)},
            "all": {"reduction_axes": everything, "feature_axes": (-1,)},
            "elements": {"reduction_axes": everything, "feature_axes": everything},
        }.values():
            if rank > 2 or axes["reduction_axes"] == (-1,):
                yield "layer_norm", {**axes, "epsilon": 0.05}, shape
                yield "rms_norm", {**axes, "epsilon": 0.05}, shape
    shape = agreement.SHAPES[3]
    yield "group_norm", {"num_groups": None, "group_size": 2}, shape
    for kind in CLASSES:
        more = {} if kind != "group_norm" else {"num_groups": 1}
        yield kind, more, shape
        yield kind, {"use_scale": False, **more}, shape


@pytest.mark.parametrize(("kind", "arguments", "shape"), list(cases()))
def test_a_layer_and_ours_agree(kind, arguments, shape):
    layer = Layer(kind, CLASSES[kind](**arguments))
    agreement.assert_agrees(NORMS[kind](**linen.norm_fields(kind, arguments)), layer, shape)
    agreement.assert_argument_round_trip(linen, kind, arguments, shape)
    agreement.assert_same(linen.norm_state(kind, layer.variables()), layer.state)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_defaults_are_those_of_the_installed_version(kind):
    theirs = inspect.signature(CLASSES[kind]).parameters
    for name, default in linen.DEFAULTS[kind].items():
        assert theirs[name].default == default


@pytest.mark.parametrize("shape", agreement.SHAPES.values())
def test_masked_batches_agree(shape):
    mask = np.random.default_rng(0).uniform(size=(*shape[:-1], 1)) < 0.7
    mask.reshape(-1)[0] = True
    x = agreement.batches(shape, count=1)[0]
    ours, theirs = BatchNorm(epsilon=0.05), nn.BatchNorm(epsilon=0.05, momentum=0.9)
    variables = agreement.start(ours, x)
    found, after = ours.apply(variables, x, train=True, mask=mask[..., 0], mutable=["batch_stats"])
    y, expected = theirs.apply(
        variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
    )
    agreement.assert_close((found, after), (y, expected), 5e-5)


def test_statistics_over_devices_agree():
    shards = np.stack(agreement.batches((3, 5, C), count=4))
    arguments = {"momentum": 0.7, "axis_name": "devices"}
    ours, theirs = (
        BatchNorm(**linen.norm_fields("batch_norm", arguments)),
        nn.BatchNorm(**arguments),
    )
    variables = agreement.start(BatchNorm(), shards[0])

    def on_devices(call):
        return jax.jit(jax.vmap(call, axis_name="devices"))(shards)

    found = on_devices(lambda x: ours.apply(variables, x, train=True, mutable=["batch_stats"]))
    expected = on_devices(
        lambda x: theirs.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    )
    agreement.assert_close(found, expected, 5e-5)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_weight_norm_agrees_in_output_and_gradients(dense, named):
    name = "inner" if named else None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = nn.Dense(4, name=name) if dense else nn.Conv(4, (3, 3), padding=1, name=name)
            return nn.WeightNorm(inner, name="wrapper")(x)

    ours = (
        WeightNorm().dense(4, name="layer")
        if dense
        else WeightNorm().conv(4, 3, use_bias=True, name="layer")
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5) if dense else (3, 4, 4, 5)).astype("f4")
    tree = Net().init(jax.random.key(0), x)["params"]
    tree = jax.tree.map(lambda value: rng.normal(size=value.shape).astype("f4"), tree)

    where = "inner" if named else "Dense_0" if dense else "Conv_0"  # Flax's own name

    def wrapped(tree):
        return {where: tree[where], **tree["wrapper"]}

    params = linen.layer_params(wrapped(tree), where)
    y, back = jax.vjp(lambda tree, x: Net().apply({"params": tree}, x), tree, x)
    weight = rng.normal(size=y.shape).astype("f4")
    expected, x_expected = back(weight)
    found, back = jax.vjp(lambda p, x: ours.apply({"params": p}, x), params, x)
    gradients, x_gradient = back(weight)
    theirs = (y, x_expected, linen.layer_params(wrapped(expected), where))
    agreement.assert_close((found, x_gradient, gradients), theirs, 5e-5)
    agreement.assert_same(linen.layer_state(params, where), wrapped(tree))


# Departures --------------------------------------------------------------------------------------


def test_at_a_mean_of_1000_the_fast_variance_is_a_multiple_of_a_sixteenth():
    """E[x²] and E[x]² lie in [2¹⁹, 2²⁰), where float32 has steps of 2⁻⁴: so has their difference.

    The true variance is 0.01, so that theirs is off by all of it, or by more than 0.05.
    """
    noise = np.random.default_rng(0).normal(size=(1024, 1))
    x = (1000 + 0.1 * (noise - noise.mean()) / noise.std()).astype("f4")
    true = x.astype("f8").var()
    np.testing.assert_allclose(true, 0.01, rtol=1e-2)
    at_once = BatchNorm(momentum=0.0)  # after one step, what is kept is the batch's
    variables = at_once.init(jax.random.key(0), x, train=True)
    _, ours = at_once.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(ours["batch_stats"]["var"], true, rtol=1e-2)
    for fast in (True, False):
        theirs = nn.BatchNorm(momentum=0.0, use_fast_variance=fast, use_running_average=False)
        _, after = theirs.apply(variables, x, mutable=["batch_stats"])
        var = float(after["batch_stats"]["var"][0])
        if fast:
            assert var * 16 == round(var * 16)
            assert abs(var - true) > 0.009
        else:
            np.testing.assert_allclose(var, true, rtol=1e-2)


def test_masked_shards_weigh_alike_there_and_by_their_values_here():
    """Four zeros on one device and a single 4 on the other: the mean is 4/5; Flax says (0 + 4)/2.

    The variance is 16/5 − (4/5)² = 2.56, Flax's (0 + 16)/2 − 2² = 4.
    """
    x = np.zeros((2, 4, 1), "f4")
    x[1] = 4
    mask = np.ones((2, 4), bool)
    mask[1, 1:] = False
    common = {"momentum": 0.0, "axis_name": "devices"}
    variables = BatchNorm().init(jax.random.key(0), x[0], train=True)

    def ours(x, mask):
        module = BatchNorm(**common)
        return module.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])[1]

    def theirs(x, mask):
        module = nn.BatchNorm(**common, use_running_average=False)
        return module.apply(variables, x, mask=mask[:, None], mutable=["batch_stats"])[1]

    for call, mean, var in ((ours, 0.8, 2.56), (theirs, 2.0, 4.0)):
        after = jax.jit(jax.vmap(call, axis_name="devices"))(x, mask)["batch_stats"]
        np.testing.assert_allclose(after["mean"], np.full((2, 1), mean), rtol=1e-5)
        np.testing.assert_allclose(after["var"], np.full((2, 1), var), rtol=1e-5)


def test_a_batch_of_nothing_is_nan_there_and_no_update_here():
    x, mask = np.ones((4, C), "f4"), np.zeros(4, bool)
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    _, ours = BatchNorm().apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
    agreement.assert_same(ours["batch_stats"], variables["batch_stats"])
    theirs = nn.BatchNorm(use_running_average=False)
    _, after = theirs.apply(variables, x, mask=mask[:, None], mutable=["batch_stats"])
    assert np.isnan(after["batch_stats"]["mean"]).all()


def test_their_weight_norm_adds_1e_12_to_the_squared_norm():
    # ‖v‖² = 1e-12, so theirs is v/√(2e-12): 1/√2 of ours, which is ±1.
    params = {"kernel": np.array([[1e-6]], "f4"), "gain": np.ones(1, "f4")}
    ours = WeightNorm().dense(1, use_bias=False, name="layer")
    theirs = nn.WeightNorm(nn.Dense(1, use_bias=False))
    one = np.ones((1, 1), "f4")
    found = theirs.apply({"params": linen.layer_state(params)}, one)
    np.testing.assert_allclose(ours.apply({"params": params}, one), 1, rtol=1e-5)
    np.testing.assert_allclose(found, 1 / np.sqrt(2), rtol=1e-5)


def test_their_default_epsilon_is_a_tenth_of_ours_but_for_batch_norm():
    # A variance of 1e-5: ours divides by √2e-5, theirs by √1.1e-5.
    x = (np.array([[1.0, -1.0]]) * np.sqrt(1e-5)).astype("f4")
    ours, _ = NORMS["layer_norm"]().init_with_output(jax.random.key(0), x, train=True)
    theirs, _ = nn.LayerNorm().init_with_output(jax.random.key(0), x)
    ratio = np.sqrt(2 / 1.1)
    np.testing.assert_allclose(jnp.asarray(theirs) / ours, np.full((1, 2), ratio), rtol=1e-4)

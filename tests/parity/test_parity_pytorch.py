"""PyTorch: the layers of torch.nn, and where they depart from ours."""

import inspect

import agreement
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity: PyTorch is not installed")

from normlab.interop import pytorch  # noqa: E402
from normlab.models.weight_space import WeightNorm  # noqa: E402
from normlab.norms import NORMS, BatchNorm, InstanceNorm  # noqa: E402

pytestmark = pytest.mark.parity

C = 6
BATCH = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
INSTANCE = {3: "InstanceNorm1d", 4: "InstanceNorm2d", 5: "InstanceNorm3d"}


class Layer:
    """A module of PyTorch, as `agreement` wants it."""

    def __init__(self, kind, module, channels_first=True):
        self.kind, self.module, self.channels_first = kind, module, channels_first

    def load(self, variables):
        state = pytorch.norm_state(self.kind, variables)
        self.module.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})

    def variables(self):
        return pytorch.norm_variables(self.kind, self.module.state_dict())

    def run(self, x, weight, train):
        self.module.train(train)
        x, weight = self.tensor(x).requires_grad_(), self.tensor(weight)
        y = self.module(x)
        self.module.zero_grad()
        (weight * y).sum().backward()
        gradients = {name: p.grad for name, p in self.module.named_parameters()}
        gradients = pytorch.norm_variables(self.kind, {**self.module.state_dict(), **gradients})
        return self.array(y), self.array(x.grad), gradients.get("params", {})

    def tensor(self, x):
        return torch.tensor(np.moveaxis(x, -1, 1) if self.channels_first else x)

    def array(self, y):
        y = y.detach().numpy()
        return np.moveaxis(y, 1, -1) if self.channels_first else y


def cases():
    for rank, shape in agreement.SHAPES.items():
        first = {"num_features": C, "eps": 0.05}
        yield "batch_norm", BATCH[rank], {**first, "momentum": 0.3}, shape
        if rank > 2:
            yield "instance_norm", INSTANCE[rank], {**first, "affine": True}, shape
        arguments = {"num_groups": 3, "num_channels": C, "eps": 0.05}
        yield "group_norm", "GroupNorm", arguments, shape
        for normalized in dict.fromkeys([(C,), (C, *shape[1:-1])]):
            arguments = {"normalized_shape": normalized, "eps": 0.05}
            yield "layer_norm", "LayerNorm", arguments, shape
            yield "rms_norm", "RMSNorm", arguments, shape
    shape = agreement.SHAPES[3]
    for more in ({}, {"affine": False}, {"bias": False}):
        yield "batch_norm", "BatchNorm1d", {"num_features": C, **more}, shape
    yield "instance_norm", "InstanceNorm1d", {"num_features": C}, shape
    for groups in (1, C):
        yield "group_norm", "GroupNorm", {"num_groups": groups, "num_channels": C}, shape
    for more in ({}, {"bias": False}, {"elementwise_affine": False}):
        yield "layer_norm", "LayerNorm", {"normalized_shape": (C,), **more}, shape
    for more in ({}, {"elementwise_affine": False}):
        yield "rms_norm", "RMSNorm", {"normalized_shape": (C,), **more}, shape


@pytest.mark.parametrize(("kind", "name", "arguments", "shape"), list(cases()))
def test_a_layer_and_ours_agree(kind, name, arguments, shape):
    fields = pytorch.norm_fields(kind, arguments)
    module = NORMS[kind](**fields)
    # PyTorch's last axes are normalized: the channels' place is first only where they are moved.
    channels_first = arguments.get("normalized_shape") != (C,)
    layer = Layer(kind, getattr(torch.nn, name)(**arguments), channels_first)
    agreement.assert_agrees(module, layer, shape)
    agreement.assert_argument_round_trip(pytorch, kind, arguments, shape)

    before = {key: value.clone() for key, value in layer.module.state_dict().items()}
    updates = int(before.get("num_batches_tracked", 0))
    back = pytorch.norm_state(kind, layer.variables(), num_batches_tracked=updates)
    agreement.assert_same(back, {key: value.numpy() for key, value in before.items()})


def test_our_layer_norm_over_all_is_their_group_norm_with_one_group():
    layer = Layer("group_norm", torch.nn.GroupNorm(1, C, eps=0.05))
    module = NORMS["layer_norm"](axes="all", epsilon=0.05)
    agreement.assert_agrees(module, layer, agreement.SHAPES[4])


@pytest.mark.parametrize("kind", pytorch.DEFAULTS)
def test_the_defaults_are_those_of_the_installed_version(kind):
    cls = {"batch_norm": "BatchNorm2d", "instance_norm": "InstanceNorm2d", "rms_norm": "RMSNorm"}
    cls |= {"layer_norm": "LayerNorm", "group_norm": "GroupNorm"}
    theirs = inspect.signature(getattr(torch.nn, cls[kind])).parameters
    for name, default in pytorch.DEFAULTS[kind].items():
        if name not in ("num_features", "num_channels"):
            assert theirs[name].default == default


def test_nothing_is_shared_with_the_module():
    module = torch.nn.BatchNorm1d(C)
    variables = pytorch.norm_variables("batch_norm", module.state_dict())
    module.running_mean += 1
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(C))


# Over devices ------------------------------------------------------------------------------------


def test_synchronized_statistics_are_those_of_the_batches_put_together():
    """SyncBatchNorm's definition; its own code runs on GPUs only."""
    fields = pytorch.norm_fields("batch_norm", {"num_features": C, "momentum": 0.3, "eps": 0.05})
    shards = np.stack(agreement.batches((3, 4, 2, C), count=4))
    weight = np.random.default_rng(1).normal(size=shards.shape).astype("f4")
    module = BatchNorm(**fields, axis_name="devices")
    variables = agreement.start(BatchNorm(**fields), shards[0])
    layer = Layer("batch_norm", torch.nn.BatchNorm2d(C, eps=0.05, momentum=0.3))
    layer.load(variables)

    def loss(params, shards):
        def on_a_device(x, weight):
            joined = {**variables, "params": params}
            y, after = module.apply(joined, x, train=True, mutable=["batch_stats"])
            return (y * weight).sum(), (y, after["batch_stats"])

        losses, (y, after) = jax.vmap(on_a_device, axis_name="devices")(shards, weight)
        return losses.sum(), (y, jax.tree.map(lambda value: value[0], after))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (gradients, x_gradient), (y, state) = gradient(variables["params"], shards)
    whole = (-1, *shards.shape[2:])
    found = layer.run(shards.reshape(whole), weight.reshape(whole), train=True)
    ours = (y.reshape(whole), x_gradient.reshape(whole), gradients)
    agreement.assert_close(ours, found, 5e-5)
    agreement.assert_close(state, layer.variables()["batch_stats"], 5e-5)


def test_statistics_that_are_not_synchronized_are_those_of_each_share():
    x = agreement.batches((6, 3, C), count=1)[0]
    fields = pytorch.norm_fields("batch_norm", {"num_features": C})
    module = BatchNorm(**fields, stats_scope="ghost", ghost_size=3)
    variables = agreement.start(module, x)
    y, _, _, after = agreement.run(module, variables, x, x, train=True)
    state = []
    for share in (x[:3], x[3:]):
        layer = Layer("batch_norm", torch.nn.BatchNorm1d(C))
        layer.load(variables)
        theirs, _, _ = layer.run(share, share, train=True)
        state.append((theirs, layer.variables()["batch_stats"]))
    agreement.assert_close(np.asarray(y), np.concatenate([y for y, _ in state]), 5e-5)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, state[0][1], state[1][1])
    agreement.assert_close(after["batch_stats"], mean, 5e-5)


# Weight norm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ["weight_g", "parametrizations"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_agrees_in_output_and_gradients(naming, dense):
    utils = torch.nn.utils
    wrap = utils.weight_norm if naming == "weight_g" else utils.parametrizations.weight_norm
    plain = torch.nn.Linear(5, 4) if dense else torch.nn.Conv2d(5, 4, 3, stride=2, padding=1)
    layer = wrap(plain)
    module = (
        WeightNorm().dense(4, name="layer")
        if dense
        else WeightNorm().conv(4, 3, strides=2, use_bias=True, name="layer")
    )
    rng = np.random.default_rng(0)
    for parameter in layer.parameters():
        parameter.data = torch.tensor(rng.normal(size=parameter.shape).astype("f4"))
    x = rng.normal(size=(3, 5) if dense else (3, 6, 6, 5)).astype("f4")
    inputs = torch.tensor(x if dense else np.moveaxis(x, -1, 1)).requires_grad_()
    y = layer(inputs)
    weight = torch.tensor(rng.normal(size=y.shape).astype("f4"))
    (weight * y).sum().backward()

    def last(tensor):
        array = tensor.detach().numpy()
        return array if dense else np.moveaxis(array, 1, -1)

    params = pytorch.layer_params(layer.state_dict())
    ours, back = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
    gradients, x_gradient = back(last(weight))
    theirs = pytorch.layer_params({name: p.grad for name, p in layer.named_parameters()})
    found = (last(y), last(inputs.grad), theirs)
    agreement.assert_close((ours, x_gradient, gradients), found, 5e-5)
    state = {name: value.numpy() for name, value in layer.state_dict().items()}
    agreement.assert_same(pytorch.layer_state(params, naming), state)


# Departures --------------------------------------------------------------------------------------


def test_our_default_stores_the_biased_variance_and_theirs_the_unbiased():
    x = np.array([[1.0], [3.0]], "f4")  # biased variance 1, unbiased 2; from 1, momentum 0.9
    layer = Layer("batch_norm", torch.nn.BatchNorm1d(1))
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    for stored, var in (("biased", 0.9 + 0.1 * 1), ("unbiased", 0.9 + 0.1 * 2)):
        module = BatchNorm(running_variance=stored)
        _, after = module.apply(variables, x, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(after["batch_stats"]["var"], var, rtol=1e-6)
    layer.run(x, x, train=True)
    np.testing.assert_allclose(layer.module.running_var, 1.1, rtol=1e-6)


def test_a_single_value_is_an_error_there_and_the_bias_here():
    x = np.full((1, C), 5.0, "f4")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.BatchNorm1d(C)(torch.tensor(x))
    y, _ = BatchNorm().init_with_output(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(y, np.zeros((1, C)))
    x = np.full((1, 1, C), 5.0, "f4")
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        torch.nn.InstanceNorm1d(C)(torch.tensor(np.moveaxis(x, -1, 1)))
    y, _ = InstanceNorm().init_with_output(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(y, np.zeros((1, 1, C)))


def test_weights_of_norm_zero_are_nan_there_and_zero_here():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1, bias=False))
    params = pytorch.layer_params(layer.state_dict())
    params["kernel"] *= 0
    state = pytorch.layer_state(params)
    layer.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    assert torch.isnan(layer(torch.ones(1, 2))).all()
    dense = WeightNorm().dense(1, use_bias=False, name="layer")
    np.testing.assert_array_equal(dense.apply({"params": params}, np.ones((1, 2), "f4")), 0)


def test_an_infinite_batch_ends_their_running_mean_and_leaves_ours():
    x = np.ones((4, C), "f4")
    x[0, 0] = np.inf
    layer = Layer("batch_norm", torch.nn.BatchNorm1d(C))
    module = BatchNorm(**pytorch.norm_fields("batch_norm", {"num_features": C}))
    variables = layer.variables()
    layer.run(x, x, train=True)
    assert not torch.isfinite(layer.module.running_mean[0])
    _, after = module.apply(variables, x, train=True, mutable=["batch_stats"])
    agreement.assert_same(after["batch_stats"], variables["batch_stats"])

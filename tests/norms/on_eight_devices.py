"""Statistics over devices. Run by `test_devices.py` in a process that has eight CPU devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from normlab.norms import (
    BatchGroupNorm,
    BatchLayerNorm,
    BatchNorm,
    BatchRenorm,
    L1BatchNorm,
    MeanOnlyBatchNorm,
)

DEVICES, SHARE = 8, 4


def values():
    """[8 devices, 4 examples, 3, 3, 2]; each device has its own mean and spread."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (DEVICES, SHARE, 3, 3, 2))
    return x * jnp.arange(1.0, 9).reshape(8, 1, 1, 1, 1) + jnp.arange(8.0).reshape(8, 1, 1, 1, 1)


def flat(x):
    return x.reshape(DEVICES * SHARE, *x.shape[2:])


def on_one(module, x, mask=None):
    """The whole batch on one device: (output, state, gradient of a loss by the input)."""
    variables = module.init(jax.random.key(0), x, train=True)

    def loss(x):
        y, updated = module.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, updated["batch_stats"])

    gradient, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(x)
    return y, state, gradient


def under_pmap(module, x, mask=None):
    """A share on each device; the state must be the same everywhere."""
    variables = module.init(jax.random.key(0), x[0], train=True)
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask

    def share(x, mask):
        def loss(x):
            y, updated = module.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updated["batch_stats"])

        gradient, (y, state) = jax.grad(loss, has_aux=True)(x)
        return y, state, gradient

    y, state, gradient = jax.pmap(share, axis_name="batch")(x, mask)
    jax.tree.map(
        lambda leaf: [np.testing.assert_array_equal(leaf[0], other) for other in leaf], state
    )
    return flat(y), jax.tree.map(lambda leaf: leaf[0], state), flat(gradient)


def assert_same(a, b):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=2e-5, rtol=2e-5), a, b)


def fields_of(scope, size=None):
    return {"stats_scope": scope, **({"ghost_size": size} if size else {})}


@pytest.mark.parametrize("cls", [BatchNorm, BatchRenorm])
@pytest.mark.parametrize(
    ("scope", "size", "same_as"),
    [
        ("global", None, fields_of("global")),
        ("device", None, fields_of("ghost", SHARE)),
        ("ghost", 2, fields_of("ghost", 2)),  # within a device
        ("ghost", 4, fields_of("ghost", 4)),  # a device's share
        ("ghost", 8, fields_of("ghost", 8)),  # over two devices
        ("ghost", 16, fields_of("ghost", 16)),
        ("ghost", 32, fields_of("global")),
    ],
)
def test_devices_change_nothing(cls, scope, size, same_as):
    x = values()
    many = under_pmap(cls(axis_name="batch", **fields_of(scope, size)), x)
    one = on_one(cls(**same_as), flat(x))
    assert_same(many, one)


@pytest.mark.parametrize(
    "cls",
    [L1BatchNorm, MeanOnlyBatchNorm, BatchLayerNorm, partial(BatchGroupNorm, num_groups=1)],
    ids=["l1", "mean only", "batch layer", "batch group"],
)
@pytest.mark.parametrize(
    ("scope", "size", "same_as"),
    [
        ("global", None, fields_of("global")),
        ("device", None, fields_of("ghost", SHARE)),
        ("ghost", 8, fields_of("ghost", 8)),
    ],
)
def test_devices_change_nothing_for_the_relatives_of_batch_normalization(cls, scope, size, same_as):
    x = values()
    mask = jnp.ones((DEVICES, SHARE), bool).at[1, 1:].set(False).at[5].set(False)
    many = under_pmap(cls(axis_name="batch", **fields_of(scope, size)), x, mask)
    one = on_one(cls(**same_as), flat(x), flat(mask))
    assert_same(many, one)


def test_device_statistics_are_not_global_ones():
    x = values()
    by_device, _, _ = under_pmap(BatchNorm(axis_name="batch", stats_scope="device"), x)
    whole, _, _ = on_one(BatchNorm(), flat(x))
    assert float(jnp.abs(by_device - whole).max()) > 0.5


def test_masked_shards_are_weighted_by_what_they_hold():
    """Device 0 holds 4 examples, device 1 holds 1, the rest are all padding.

    Flax's synchronized BatchNorm averages the means of shards (a quarter of the examples would
    have half of the weight) and gives NaN for a shard of padding alone.
    """
    x = values()
    mask = jnp.zeros((DEVICES, SHARE), bool).at[0].set(True).at[1, 0].set(True)
    y, state, gradient = under_pmap(BatchNorm(axis_name="batch"), x, mask)
    one = on_one(BatchNorm(), flat(x), flat(mask))
    assert_same((y, state), one[:2])
    assert bool(jnp.isfinite(gradient).all())
    exact = np.asarray(flat(x)[:5], np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(state["mean"], 0.1 * exact, rtol=1e-5)


@pytest.mark.parametrize("scope", ["device", "ghost"])
def test_shards_of_padding_have_no_weight_in_the_running_average(scope):
    x = values()
    mask = jnp.zeros((DEVICES, SHARE), bool).at[:2].set(True)
    size = SHARE if scope == "ghost" else None
    module = BatchNorm(axis_name="batch", momentum=0.0, **fields_of(scope, size))
    _, state, _ = under_pmap(module, x, mask)
    means = np.asarray(x[:2], np.float64).mean((1, 2, 3))
    np.testing.assert_allclose(state["mean"], means.mean(0), rtol=1e-5)


def test_one_bad_value_on_one_device_leaves_the_state_of_all():
    x = values().at[5, 0, 0, 0, 0].set(jnp.inf)
    for scope in ("global", "device"):
        _, state, _ = under_pmap(BatchNorm(axis_name="batch", stats_scope=scope), x)
        np.testing.assert_array_equal(state["mean"], [0, 0])
        np.testing.assert_array_equal(state["var"], [1, 1])


def test_moments_are_left_for_the_whole_batch():
    x = values()
    module = BatchNorm(axis_name="batch", stats_scope="device")
    variables = module.init(jax.random.key(0), x[0], train=True)

    def share(x):
        return module.apply(variables, x, train=True, mutable=["batch_stats", "batch_moments"])[1]

    found = jax.pmap(share, axis_name="batch")(x)["batch_moments"]["moments"]
    exact = np.asarray(flat(x), np.float64)
    np.testing.assert_allclose(found.mean[0], exact.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.var[0], exact.var((0, 1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(found.count[0], [32 * 9] * 2)


def test_a_ghost_that_fits_no_whole_number_of_devices_is_refused():
    with pytest.raises(ValueError, match="ghost_size 12 does not divide 8 devices of 4 examples"):
        under_pmap(BatchNorm(axis_name="batch", stats_scope="ghost", ghost_size=12), values())


@pytest.mark.parametrize("cls", [BatchNorm, BatchRenorm])
@pytest.mark.parametrize(
    "fields",
    [
        fields_of("global"),
        {"stats_scope": "device", "device_groups": 8},
        fields_of("ghost", 2),
        fields_of("ghost", 16),
    ],
    ids=str,
)
def test_a_sharded_batch_under_jit_is_the_same_as_one_device(cls, fields):
    x = flat(values())
    module = cls(**fields)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    many = jax.jit(lambda x: on_one(module, x))(sharded)
    assert_same(many, on_one(module, x))

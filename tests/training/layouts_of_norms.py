"""Every normalizer with state, under every layout. Run by `test_parallel.py` on eight CPU devices.

A net of two linear layers, each with the normalizer behind it, so that the second's statistics
depend on the first's, takes two steps. Whatever the layout, outputs, gradients and state must be
those of one device that has the whole batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from normlab.models.conv import StandardConv, linear_norm
from normlab.norms import NORMS, join_state, split_state
from normlab.norms.groups import BatchNormalizer

DEVICES, EXAMPLES, POSITIONS, CHANNELS = 8, 32, 6, 3
SHARE = EXAMPLES // DEVICES

FIELDS = {
    "power_norm": {"warmup_steps": 1},
    "moving_average_batch_norm": {"window": 1, "warmup_steps": 1, "correction_start_steps": 0},
    "batch_group_norm": {"num_groups": 3},
    "evonorm_b0": {"activation": nn.silu},
    "batch_renorm": {"ramp_start_steps": 0, "r_ramp_end_steps": 1, "d_ramp_end_steps": 1},
    "cross_iteration_batch_norm": {"window": 3},
}
STATEFUL = [kind for kind in NORMS if NORMS[kind].stateful]
SCOPES = {
    "global": {"stats_scope": "global"},
    "device": {"stats_scope": "device"},
    "ghost within a device": {"stats_scope": "ghost", "ghost_size": SHARE // 2},
    "ghost over two devices": {"stats_scope": "ghost", "ghost_size": 2 * SHARE},
}
MASKS = {
    "no padding": np.ones(EXAMPLES, bool),
    "shards of unequal counts, one of padding alone": np.repeat([4, 1, 3, 4, 2, 0, 4, 2], SHARE)
    > np.tile(np.arange(SHARE), DEVICES),
}


class Net(nn.Module):
    cls: type
    fields: dict

    @nn.compact
    def __call__(self, x, *, train, mask):
        for i in range(2):
            dense = StandardConv().dense(CHANNELS, use_bias=False, name=f"dense{i}")
            norm = self.cls(**self.fields, name=f"norm{i}")
            x = linear_norm(dense, norm, x, train=train, mask=mask)
        return x


def net(kind, scope, **devices):
    cls = NORMS[kind]
    fields = dict(FIELDS.get(kind, {}))
    if issubclass(cls, BatchNormalizer):
        fields |= SCOPES[scope]
        if fields["stats_scope"] != "device":
            devices.pop("device_groups", None)
    else:
        devices.pop("device_groups", None)
    return Net(cls, {**fields, **devices})


def examples():
    """[N, positions, C]; each device's share has its own mean and spread."""
    x = jax.random.normal(jax.random.key(0), (EXAMPLES, POSITIONS, CHANNELS))
    device = jnp.repeat(jnp.arange(DEVICES), SHARE)[:, None, None]
    return x * (1 + device / 4) + device / 2


def step(module, variables, x, mask, axis=None):
    """A step's (output, gradients by parameters and x, new state), of a share of the batch."""
    weights = 1 + jnp.arange(CHANNELS)

    def loss(params, x, backward, others):
        state = join_state(others, backward)
        y, updated = module.apply(
            {"params": params, "batch_stats": state},
            x,
            train=True,
            mask=mask,
            mutable=["batch_stats"],
        )
        # What is masked has no say: it is normalized as the others are, but it is padding.
        total = jnp.sum(jnp.where(mask[:, None, None], jnp.sin(y * weights), 0))
        return total / (EXAMPLES * POSITIONS), (y, updated["batch_stats"])

    by, (y, state) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
        variables["params"], x, *split_state(variables["batch_stats"])
    )
    by_params, by_x, backward = by
    by_x = by_x * EXAMPLES * POSITIONS  # of the sum, for each is of one example alone
    if axis:
        by_params = jax.lax.psum(by_params, axis)
    return y, by_params, by_x, join_state(state, backward)


def two_steps(run, variables, x, mask):
    """Returns the second step's results, the first with all examples."""
    *_, state = run(variables, x[::-1] + 1, jnp.ones_like(mask))
    return run({**variables, "batch_stats": state}, x, mask)


def on_one(kind, scope):
    """The whole batch on one device, where `device` is ghosts of a device's share."""
    groups = DEVICES if scope == "device" else 1
    module = net(kind, scope, device_groups=groups)
    return module, jax.jit(lambda v, x, m: step(module, v, x, m))


def sharded(kind, scope):
    _, run = on_one(kind, scope)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (["data"], []))
    inner = run.__wrapped__
    return jax.jit(inner, in_shardings=(whole, rows, rows))


def replicas(kind, scope):
    """pmap over eight devices."""
    module = net(kind, scope, axis_name="batch")
    mapped = jax.pmap(
        lambda v, x, m: step(module, v, x, m, "batch"),
        axis_name="batch",
        in_axes=(None, 0, 0),
        out_axes=(0, None, 0, None),
    )

    def run(variables, x, mask):
        split = x.reshape(DEVICES, SHARE, *x.shape[1:]), mask.reshape(DEVICES, SHARE)
        y, by_params, by_x, state = mapped(variables, *split)
        return y.reshape(x.shape), by_params, by_x.reshape(x.shape), state

    return run


def replicas_on_a_grid(kind, scope):
    """A replica on each device of a grid of 4 × 2, its two axes named together."""
    axes = ("host", "batch")
    module = net(kind, scope, axis_name=axes)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            lambda v, x, m: step(module, v, x, m, axes),
            mesh=Mesh(np.array(jax.devices()).reshape(4, 2), axes),
            in_specs=(whole, rows, rows),
            out_specs=(rows, whole, rows, whole),
            check_vma=False,
        )
    )


LAYOUTS = {
    "jit over 8": sharded,
    "pmap over 8": replicas,
    "4 x 2": replicas_on_a_grid,
}


def cases():
    for kind in STATEFUL:
        scoped = issubclass(NORMS[kind], BatchNormalizer)
        for scope in SCOPES if scoped else ["global"]:
            yield pytest.param(kind, scope, id=f"{kind}-{scope}")


@pytest.mark.parametrize(("kind", "scope"), list(cases()))
def test_the_layout_of_devices_changes_no_number(kind, scope):
    x = examples()
    module, run = on_one(kind, scope)
    init = jax.jit(lambda key, x: module.init(key, x, train=False, mask=None))
    variables = init(jax.random.key(1), x[:2])
    expected = {name: two_steps(run, variables, x, jnp.array(mask)) for name, mask in MASKS.items()}
    for layout, make in LAYOUTS.items():
        if layout == "4 x 2" and scope == "ghost over two devices":
            continue  # groups of replicas are named by their place on one axis
        run = make(kind, scope)
        for name, mask in MASKS.items():
            found = two_steps(run, variables, x, jnp.array(mask))
            what = ("output", "gradient by parameters", "gradient by x", "state")
            for part, a, b in zip(what, found, expected[name], strict=True):
                jax.tree_util.tree_map_with_path(
                    lambda path, p, q: np.testing.assert_allclose(
                        p,
                        q,
                        atol=1e-5 * max(1, float(jnp.abs(q).max())),
                        err_msg=f"{layout}, {name}: {part}{jax.tree_util.keystr(path)}",
                    ),
                    a,
                    b,
                )
                assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(a))

"""Limiting cases: where one normalizer becomes another, and beside each where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.norms import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm


def values(shape=(8, 6, 6, 4), seed=0):
    """Each example has its own mean and spread, so that scopes differ."""
    keys = jax.random.split(jax.random.key(seed), 3)
    spread = jax.random.uniform(keys[0], (shape[0], *[1] * (len(shape) - 1)), minval=0.5, maxval=3)
    offset = jax.random.normal(keys[1], spread.shape) * 2
    return jax.random.normal(keys[2], shape) * spread + offset


def apply(module, x, train=True, variables=None, mask=None):
    if variables is None:
        variables = module.init(jax.random.key(0), x, train=True)
    return module.apply(variables, x, train=train, mask=mask, mutable=["batch_stats"])


def gradient(module, x):
    variables = module.init(jax.random.key(0), x, train=True)

    def loss(x):
        return jnp.sum(jnp.sin(apply(module, x, variables=variables)[0]))

    return jax.grad(loss)(x)


def assert_same(a, b, x):
    """Same output, same gradient, same running statistics."""
    (ya, state_a), (yb, state_b) = apply(a, x), apply(b, x)
    np.testing.assert_allclose(ya, yb, atol=2e-5)
    np.testing.assert_allclose(gradient(a, x), gradient(b, x), atol=2e-5)
    np.testing.assert_allclose(
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state_a)] or [[0]]),
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state_b)] or [[0]]),
        atol=2e-5,
    )


def assert_differ(a, b, x, by=0.05):
    ya, yb = apply(a, x)[0], apply(b, x)[0]
    assert float(jnp.abs(ya - yb).max()) > by


# Groups of channels ------------------------------------------------------------------------------


def test_one_group_is_layer_normalization_over_all():
    assert_same(GroupNorm(num_groups=1), LayerNorm(axes="all"), values())


def test_two_groups_are_not():
    x = values() + jnp.asarray([0.0, 0, 3, 3])
    assert_differ(GroupNorm(num_groups=2), LayerNorm(axes="all"), x)


def test_as_many_groups_as_channels_is_instance_normalization():
    assert_same(GroupNorm(num_groups=4), InstanceNorm(), values())
    assert_same(GroupNorm(group_size=1), InstanceNorm(), values())


def test_half_as_many_are_not():
    x = values() + jnp.asarray([0.0, 2, 0, 2])
    assert_differ(GroupNorm(num_groups=2), InstanceNorm(), x)


def test_group_size_is_channels_over_groups():
    assert_same(GroupNorm(group_size=2), GroupNorm(num_groups=2), values())


def test_group_normalization_by_hand():
    # Channels (1, 3 | 10, 30): means 2 and 20, standard deviations 1 and 10.
    y, _ = apply(GroupNorm(num_groups=2, epsilon=0.0), jnp.asarray([[1.0, 3, 10, 30]]))
    np.testing.assert_allclose(y, [[-1, 1, -1, 1]], atol=1e-6)


@pytest.mark.parametrize(
    ("wish", "channels", "settled"),
    [(32, 64, 32), (32, 16, 16), (32, 24, 24), (4, 6, 3), (5, 7, 1)],
)
def test_a_grouping_that_does_not_divide_is_settled_at_the_largest_divisor(wish, channels, settled):
    module = GroupNorm(num_groups=wish, strict=False)
    assert module.groups_of(channels) == settled
    if channels % wish:
        with pytest.raises(ValueError, match=f"num_groups {wish} does not divide {channels}"):
            GroupNorm(num_groups=wish).groups_of(channels)


# Axes of layer normalization ---------------------------------------------------------------------


def test_over_a_single_position_both_meanings_are_one():
    x = values((8, 1, 1, 16))
    assert_same(LayerNorm(axes="all"), LayerNorm(axes="channel"), x)
    assert_same(RMSNorm(axes="all"), RMSNorm(axes="channel"), x)


def test_over_several_they_are_not():
    assert_differ(LayerNorm(axes="all"), LayerNorm(axes="channel"), values())


def test_layer_normalization_by_hand():
    # 1, 3, 5: mean 3, variance 8/3; 2/√(8/3) = 1.2247.
    y, _ = apply(LayerNorm(axes="channel", epsilon=0.0), jnp.asarray([[1.0, 3, 5]]))
    np.testing.assert_allclose(y, [[-1.2247449, 0, 1.2247449]], atol=1e-6)


def test_rms_normalization_of_centered_values_is_layer_normalization():
    x = values((8, 1, 1, 16))
    centered = x - x.mean(-1, keepdims=True)
    rms, layer = RMSNorm(axes="channel"), LayerNorm(axes="channel")
    np.testing.assert_allclose(apply(rms, centered)[0], apply(layer, centered)[0], atol=2e-5)
    assert_differ(rms, layer, x + 1)
    # Nor are the gradients the same: only layer normalization takes the mean out of them.
    assert float(jnp.abs(gradient(rms, centered) - gradient(layer, centered)).max()) > 0.05


def test_rms_normalization_by_hand():
    # 1, 7: root mean square √(50/2) = 5.
    y, _ = apply(RMSNorm(axes="channel", epsilon=0.0), jnp.asarray([[1.0, 7.0]]))
    np.testing.assert_allclose(y, [[0.2, 1.4]], atol=1e-6)


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_elementwise_parameters_have_the_shape_of_what_is_normalized(cls):
    x = values()
    over_all = cls(axes="all", elementwise=True).init(jax.random.key(0), x, train=True)
    assert over_all["params"]["scale"].shape == (6, 6, 4)
    channel = cls(axes="channel", elementwise=True).init(jax.random.key(0), x, train=True)
    assert channel["params"]["scale"].shape == (4,)


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_unknown_axes_are_refused(cls):
    with pytest.raises(ValueError, match="axes 'hw' is none of all, channel"):
        apply(cls(axes="hw"), values())


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_within_an_example_the_variance_is_robust_too(offset):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 16))
    for module in (
        LayerNorm(axes="channel"),
        LayerNorm(axes="all"),
        GroupNorm(num_groups=4),
        InstanceNorm(),
    ):
        rounded = (x + offset) - offset  # what float32 keeps of x beside the offset
        y, exact = apply(module, x + offset)[0], apply(module, rounded)[0]
        np.testing.assert_allclose(y, exact, atol=0.01)


# Batch normalization and its scopes --------------------------------------------------------------


def test_batch_normalization_by_hand():
    # 1, 2, 3, 6: mean 3, variance 3.5, √3.5 = 1.8708.
    y, updated = apply(BatchNorm(epsilon=0.0), jnp.asarray([[1.0], [2], [3], [6]]))
    np.testing.assert_allclose(y[:, 0], np.asarray([-2, -1, 0, 3]) / 1.8708287, rtol=1e-5)
    state = updated["batch_stats"]
    assert float(state["mean"][0]) == pytest.approx(0.3)  # 0.9·0 + 0.1·3
    assert float(state["var"][0]) == pytest.approx(1.25)  # 0.9·1 + 0.1·3.5


def test_the_unbiased_variance_is_stored_only():
    x = jnp.asarray([[1.0], [2], [3], [6]])
    y, updated = apply(BatchNorm(epsilon=0.0, running_variance="unbiased"), x)
    np.testing.assert_allclose(y[:, 0], np.asarray([-2, -1, 0, 3]) / 1.8708287, rtol=1e-5)
    # 3.5·4/3 = 4.6667; 0.9·1 + 0.1·4.6667
    assert float(updated["batch_stats"]["var"][0]) == pytest.approx(1.3666667)


def test_at_inference_the_running_averages_stand_in():
    # (5 − 1)/√(4 + 0) = 2
    state = {"batch_stats": {"mean": jnp.asarray([1.0]), "var": jnp.asarray([4.0])}}
    module = BatchNorm(epsilon=0.0, use_scale=False, use_bias=False)
    assert float(module.apply(state, jnp.asarray([[5.0]]), train=False)[0, 0]) == 2


def ghost(size, cls=BatchNorm, **fields):
    return cls(stats_scope="ghost", ghost_size=size, **fields)


@pytest.mark.parametrize("cls", [BatchNorm, BatchRenorm])
def test_a_ghost_of_the_whole_batch_is_global(cls):
    assert_same(ghost(8, cls), cls(), values())


def test_a_smaller_ghost_is_not():
    assert_differ(ghost(4), BatchNorm(), values())


@pytest.mark.parametrize("cls", [BatchNorm, BatchRenorm])
def test_a_ghost_of_a_devices_share_is_device(cls):
    assert_same(ghost(2, cls), cls(stats_scope="device", device_groups=4), values())


def test_a_ghost_of_another_size_is_not():
    assert_differ(ghost(4), BatchNorm(stats_scope="device", device_groups=4), values())


def test_a_ghost_of_one_is_instance_normalization_in_training_but_not_in_evaluation():
    x = values()
    np.testing.assert_allclose(apply(ghost(1), x)[0], apply(InstanceNorm(), x)[0], atol=2e-5)
    evaluated, _ = apply(ghost(1), x, train=False)
    assert float(jnp.abs(evaluated - apply(InstanceNorm(), x)[0]).max()) > 0.5


def test_groups_are_consecutive_examples():
    x = values()
    y, _ = apply(ghost(4), x)
    for start in (0, 4):
        np.testing.assert_allclose(
            y[start : start + 4], apply(BatchNorm(), x[start : start + 4])[0], atol=2e-5
        )


def test_running_statistics_average_the_groups_with_equal_weight():
    # Groups {0, 2} and {10, 10}: means 1 and 10, variances 1 and 0. Their mean variance is 0.5,
    # where the law of total variance would give 20.75.
    x = jnp.asarray([[0.0], [2], [10], [10]])
    _, updated = apply(ghost(2, momentum=0.0), x)
    assert float(updated["batch_stats"]["mean"][0]) == 5.5
    assert float(updated["batch_stats"]["var"][0]) == 0.5


def test_an_empty_group_has_no_weight():
    x = jnp.asarray([[0.0], [2], [10], [10]])
    mask = jnp.asarray([True, True, False, False])
    _, updated = apply(ghost(2, momentum=0.0), x, mask=mask)
    assert float(updated["batch_stats"]["mean"][0]) == 1
    assert float(updated["batch_stats"]["var"][0]) == 1


def test_evaluation_knows_no_groups():
    x = values()
    state = {"mean": jnp.arange(4.0), "var": jnp.arange(1.0, 5)}
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    variables = {"params": params, "batch_stats": state}
    plain, _ = apply(BatchNorm(), x[:3], train=False, variables=variables)
    grouped, _ = apply(ghost(4), x[:3], train=False, variables=variables)  # 4 does not divide 3
    np.testing.assert_array_equal(plain, grouped)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stats_scope": "ghost", "ghost_size": 3}, "ghost_size 3 does not divide the batch of 8"),
        ({"stats_scope": "ghost"}, "needs ghost_size of 1 or more, not None"),
        ({"stats_scope": "ghost", "ghost_size": 0}, "needs ghost_size of 1 or more, not 0"),
        ({"stats_scope": "device", "device_groups": 3}, "3 device groups do not divide"),
        ({"stats_scope": "gost"}, "'gost' is none of global, device, ghost"),
        ({"running_variance": "sample"}, "'sample' is not biased or unbiased"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    x = values()
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    with pytest.raises(ValueError, match=message):
        apply(BatchNorm(**fields), x, variables=variables)


# Batch renormalization ---------------------------------------------------------------------------

PLAIN = {"r_max": 1.0, "d_max": 0.0}
FULL = {"ramp_start_steps": 0, "r_ramp_end_steps": 0, "d_ramp_end_steps": 0}


def test_renormalization_without_correction_is_batch_normalization_in_training():
    x = values()
    renorm, batch = BatchRenorm(**PLAIN, **FULL), BatchNorm()
    np.testing.assert_allclose(apply(renorm, x)[0], apply(batch, x)[0], atol=2e-5)
    np.testing.assert_allclose(gradient(renorm, x), gradient(batch, x), atol=2e-5)


def test_but_not_in_evaluation():
    # Batches {−1, 1} and {−3, 3}: σ is 1 and 3, σ² 1 and 9. With momentum 0.5 from 1:
    # σ: 0.5·(0.5·1 + 0.5·1) + 0.5·3 = 2; σ²: 0.5·1 + 0.5·9 = 5, √5 = 2.236.
    renorm, batch = (
        BatchRenorm(**PLAIN, **FULL, momentum=0.5, epsilon=0.0),
        BatchNorm(momentum=0.5, epsilon=0.0),
    )
    x = jnp.asarray([[-1.0], [1.0]])
    results = []
    for module in (renorm, batch):
        variables = module.init(jax.random.key(0), x, train=True)
        for batch_of in (x, 3 * x):
            _, updated = apply(module, batch_of, variables=variables)
            variables = {**variables, **updated}
        results.append(float(module.apply(variables, jnp.ones((1, 1)), train=False)[0, 0]))
    assert results == [pytest.approx(1 / 2), pytest.approx(1 / np.sqrt(5))]


def test_renormalization_with_correction_is_not_batch_normalization():
    assert_differ(BatchRenorm(**FULL), BatchNorm(), values())


def test_renormalization_by_hand():
    # {2, 6}: μ_B = 4, σ_B = 2; state μ = 1, σ = 1. r = clip(2/1, 1/3, 3) = 2, d = clip(3/1) = 3.
    # x̂ = (x − 4)/2·2 + 3 = x − 1: what evaluation gives, (x − 1)/1.
    module = BatchRenorm(**FULL, epsilon=0.0, use_scale=False, use_bias=False)
    state = {"mean": jnp.asarray([1.0]), "sigma": jnp.asarray([1.0]), "step": jnp.int32(7)}
    x = jnp.asarray([[2.0], [6.0]])
    y, updated = apply(module, x, variables={"batch_stats": state})
    np.testing.assert_allclose(y, x - 1)
    np.testing.assert_allclose(module.apply({"batch_stats": state}, x, train=False), x - 1)
    # The state moves by the batch's own: 0.9·1 + 0.1·4 and 0.9·1 + 0.1·2.
    assert float(updated["batch_stats"]["mean"][0]) == pytest.approx(1.3)
    assert float(updated["batch_stats"]["sigma"][0]) == pytest.approx(1.1)
    assert int(updated["batch_stats"]["step"]) == 8


def test_the_corrections_are_clipped():
    # As above with r_max 1.5, d_max 2: x̂ = (x − 4)/2·1.5 + 2.
    module = BatchRenorm(**FULL, r_max=1.5, d_max=2.0, epsilon=0.0, use_scale=False, use_bias=False)
    state = {"mean": jnp.asarray([1.0]), "sigma": jnp.asarray([1.0]), "step": jnp.int32(0)}
    y, _ = apply(module, jnp.asarray([[2.0], [6.0]]), variables={"batch_stats": state})
    np.testing.assert_allclose(y[:, 0], [0.5, 3.5])


def test_the_scale_is_clipped_from_below_by_the_inverse():
    # σ_B = 1 against σ = 10: r = clip(0.1, 1/2, 2) = 0.5; x̂ = ±1·0.5.
    module = BatchRenorm(**FULL, r_max=2.0, epsilon=0.0, use_scale=False, use_bias=False)
    state = {"mean": jnp.asarray([0.0]), "sigma": jnp.asarray([10.0]), "step": jnp.int32(0)}
    y, _ = apply(module, jnp.asarray([[-1.0], [1.0]]), variables={"batch_stats": state})
    np.testing.assert_allclose(y[:, 0], [-0.5, 0.5])


def test_no_gradient_flows_through_the_corrections():
    """With r and d constants the output is affine in x̂_B: ∂/∂x is r times batch norm's."""
    x = jnp.asarray([[2.0], [6.0], [7.0]])
    state = {"mean": jnp.asarray([4.0]), "sigma": jnp.asarray([1.0]), "step": jnp.int32(0)}
    sigma_b = float(jnp.std(x))
    module = BatchRenorm(**FULL, epsilon=0.0, use_scale=False, use_bias=False)
    plain = BatchNorm(epsilon=0.0, use_scale=False, use_bias=False)
    weights = jnp.asarray([[1.0], [2.0], [-1.5]])

    def loss(module, x, state):
        return jnp.sum(weights * apply(module, x, variables={"batch_stats": state})[0])

    renorm = jax.grad(lambda x: loss(module, x, state))(x)
    batch = jax.grad(lambda x: loss(plain, x, {"mean": state["mean"], "var": jnp.ones(1)}))(x)
    np.testing.assert_allclose(renorm, batch * sigma_b, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "r", "d"),
    # ramps: r from 10 to 30, d from 10 to 20
    [(0, 1, 0), (10, 1, 0), (15, 1.5, 2.5), (20, 2, 5), (25, 2.5, 5), (30, 3, 5), (99, 3, 5)],
)
def test_the_limits_ramp_linearly(step, r, d):
    module = BatchRenorm(ramp_start_steps=10, r_ramp_end_steps=30, d_ramp_end_steps=20)
    found_r, found_d = module.limits(step)
    assert float(found_r) == pytest.approx(r)
    assert float(found_d) == pytest.approx(d)


def test_a_ramp_of_no_length_is_a_step():
    module = BatchRenorm(ramp_start_steps=5, r_ramp_end_steps=5, d_ramp_end_steps=5)
    assert [float(module.limits(step)[0]) for step in (4, 5)] == [1, 3]


def test_the_limits_move_inside_one_compiled_step():
    """The count of updates is state, not a Python number: nothing is compiled anew."""
    # Ramps from update 1: r_max over four updates to 3, d_max over two to 5. The batch ±4 + 100 is
    # far above the state (0, 1), which momentum 1 holds there: both corrections are at their
    # limits, and the output is ±r + d.
    module = BatchRenorm(
        ramp_start_steps=1, r_ramp_end_steps=5, d_ramp_end_steps=3, momentum=1.0, epsilon=0.0
    )
    x, traces = jnp.asarray([[96.0], [104.0]]), []

    @jax.jit
    def step(variables):
        traces.append(1)
        y, updated = apply(module, x, variables=variables)
        return y, {**variables, **updated}

    variables = module.init(jax.random.key(0), x, train=True)
    found = []
    for count in range(1, 8):
        (low, high), variables = step(variables)
        found.append(((high - low).item() / 2, (high + low).item() / 2))
        assert int(variables["batch_stats"]["step"]) == count
    assert found == [(1, 0), (1, 0), (1.5, 2.5), (2, 5), (2.5, 5), (3, 5), (3, 5)]
    assert len(traces) == 1


def test_an_empty_batch_does_not_count_as_an_update():
    module = BatchRenorm()
    _, updated = apply(module, values(), mask=jnp.zeros(8, bool))
    assert int(updated["batch_stats"]["step"]) == 0

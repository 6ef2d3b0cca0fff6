"""The relatives of batch normalization against float64 references written from the papers."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.norms import (
    BatchGroupNorm,
    BatchLayerNorm,
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    L1BatchNorm,
    LayerNorm,
    MeanOnlyBatchNorm,
)

MOMENTUM = 0.9
SHAPE = (6, 3, 4)  # examples, positions, channels


def data(seed, shape=SHAPE):
    """Channels and examples with means and spreads of their own."""
    random = np.random.default_rng(seed)
    spread = random.uniform(0.5, 2, (shape[0], *[1] * (len(shape) - 1)))
    return random.normal(size=shape) * spread + random.normal(size=shape[-1]) * 3


def average(old, new):
    return {name: MOMENTUM * old[name] + (1 - MOMENTUM) * new[name] for name in old}


# References --------------------------------------------------------------------------------------
# Each: the output in training, the statistics of a batch, the start, and the output at inference.


def l1_batch(x):
    mean = x.mean((0, 1))
    return mean, np.sqrt(np.pi / 2) * np.abs(x - mean).mean((0, 1))


def l1_train(x):
    mean, sigma = l1_batch(x)
    return (x - mean) / (sigma + 1e-5)


def l1_update(state, x):
    mean, sigma = l1_batch(x)
    return average(state, {"mean": mean, "sigma": sigma})


def l1_evaluate(state, x):
    return (x - state["mean"]) / (state["sigma"] + 1e-5)


def mean_only_train(x):
    return x - x.mean((0, 1))


def mean_only_update(state, x):
    return average(state, {"mean": x.mean((0, 1))})


def mean_only_evaluate(state, x):
    return x - state["mean"]


def hybrid_train(x):
    """Three examples and two of the four channels in a group."""
    y = np.empty_like(x)
    for first in (0, 3):
        for channel in (0, 2):
            part = x[first : first + 3, :, channel : channel + 2]
            y[first : first + 3, :, channel : channel + 2] = (part - part.mean()) / np.sqrt(
                part.var() + 1e-5
            )
    return y


def hybrid_update(state, x):
    first = average({"mean": state["mean"]}, {"mean": x.mean((0, 1))})["mean"]
    second = MOMENTUM * (state["var"] + state["mean"] ** 2)
    second = second + (1 - MOMENTUM) * (x**2).mean((0, 1))
    return {"mean": first, "var": second - first**2}


def hybrid_evaluate(state, x):
    second = state["var"] + state["mean"] ** 2
    mean = np.repeat(state["mean"].reshape(2, 2).mean(1), 2)
    var = np.repeat(second.reshape(2, 2).mean(1), 2) - mean**2
    return (x - mean) / np.sqrt(var + 1e-5)


def mixed(x, m, mean, var):
    features = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    batch = (x - mean) / np.sqrt(var + 1e-3)
    weighted = (1 / m - 1e-4) * features + (1 - (1 / m + 1e-4)) * batch
    return weighted / np.sqrt(x.shape[-1])


def layered_train(x):
    return mixed(x, len(x), x.mean(0), x.var(0))


def layered_update(state, x):
    m = len(x)
    new = {
        "mean": x.mean(0),
        "var": m / (m - 1) * x.var(0),
        "feature_mean": x.mean(-1, keepdims=True).mean(0),
        "feature_var": x.var(-1, keepdims=True).mean(0),
    }
    return average(state, new)


def layered_evaluate(state, x):
    return mixed(x, SHAPE[0], state["mean"], state["var"])


@dataclasses.dataclass
class Case:
    module: Callable
    train: Callable
    update: Callable
    evaluate: Callable
    start: dict


ZERO, ONE = np.zeros(4), np.ones(4)
CASES = {
    "l1": Case(L1BatchNorm, l1_train, l1_update, l1_evaluate, {"mean": ZERO, "sigma": ONE}),
    "mean only": Case(
        MeanOnlyBatchNorm, mean_only_train, mean_only_update, mean_only_evaluate, {"mean": ZERO}
    ),
    "hybrid": Case(
        lambda **fields: BatchGroupNorm(num_groups=2, stats_scope="ghost", ghost_size=3, **fields),
        hybrid_train,
        hybrid_update,
        hybrid_evaluate,
        {"mean": ZERO, "var": ONE},
    ),
    "layered": Case(
        BatchLayerNorm,
        layered_train,
        layered_update,
        layered_evaluate,
        {
            "mean": np.zeros((3, 4)),
            "var": np.ones((3, 4)),
            "feature_mean": np.zeros((3, 1)),
            "feature_var": np.ones((3, 1)),
        },
    ),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def train(module, x, variables=None, mask=None):
    """(output, variables after) of a training step, compiled."""
    x = jnp.asarray(x)
    if variables is None:
        variables = module.init(jax.random.key(0), x, train=True)

    @jax.jit
    def step(variables, x):
        y, updated = module.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        return y, {**variables, **updated}

    return step(variables, x)


def gradient(module, x, weights):
    """The gradient of Σ weights · y by x, in float64."""
    variables = module.init(jax.random.key(0), x, train=True)

    def loss(x):
        y, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(weights * y)

    return jax.jit(jax.grad(loss))(jnp.asarray(x))


def differences(function, x, weights, step=1e-6):
    """The same of a numpy function, by central differences."""
    found = np.empty_like(x)
    for index in np.ndindex(*x.shape):
        change = np.zeros_like(x)
        change[index] = step
        up, down = function(x + change), function(x - change)
        found[index] = np.sum(weights * (up - down)) / (2 * step)
    return found


@EVERY
def test_three_steps_and_inference_agree_with_the_reference(case):
    module, state, variables = case.module(), case.start, None
    for seed in range(3):
        x = data(seed)
        y, variables = train(module, x.astype(np.float32), variables)
        np.testing.assert_allclose(y, case.train(x), atol=2e-5)
        state = case.update(state, x)
        for name, value in state.items():
            np.testing.assert_allclose(variables["batch_stats"][name], value, atol=2e-6, rtol=2e-6)
    x = data(3)
    y = module.apply(variables, x.astype(np.float32), train=False)
    np.testing.assert_allclose(y, case.evaluate(state, x), atol=2e-5)


@EVERY
def test_gradients_agree_with_differences_of_the_reference(case):
    with jax.enable_x64(True):
        x, weights = data(0), np.random.default_rng(9).normal(size=SHAPE)
        found = gradient(case.module(param_dtype="float64"), x, weights)
        np.testing.assert_allclose(found, differences(case.train, x, weights), atol=1e-6)


@EVERY
@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.04), ("float16", 0.005)])
def test_half_precision_rounds_the_output_and_nothing_else(case, dtype, atol):
    x = jnp.asarray(data(0), dtype)
    y, variables = train(case.module(), x)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), case.train(exact), atol=atol)
    for name, value in case.update(case.start, exact).items():
        np.testing.assert_allclose(variables["batch_stats"][name], value, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("case", [CASES["l1"], CASES["mean only"]], ids=["l1", "mean only"])
def test_positions_that_are_masked_count_nowhere(case):
    """Random ones: the others come out as if a channel had only those."""
    mask, x = np.random.default_rng(5).random(SHAPE[:2]) < 0.6, data(0)
    y, _ = train(case.module(), np.where(mask[..., None], x, 99).astype("f4"), mask=mask)
    np.testing.assert_allclose(y[mask], case.train(x[mask][None])[0], atol=2e-5)


def test_examples_that_are_masked_count_in_no_part_of_a_batch():
    mask, x = np.array([1, 1, 0, 1, 1, 0], bool), data(0)
    padded = np.where(mask[:, None, None], x, 99).astype("f4")
    y, _ = train(BatchLayerNorm(), padded, mask=mask)  # m is 4
    np.testing.assert_allclose(y[mask], layered_train(x[mask]), atol=2e-5)
    y, _ = train(CASES["hybrid"].module(), padded, mask=mask)
    part = x[:2, :, :2]  # what is left of the first group, its first two channels
    exact = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    np.testing.assert_allclose(y[:2, :, :2], exact, atol=2e-5)


@EVERY
def test_it_keeps_its_digits_far_from_zero(case):
    """Mean over standard deviation 10⁴: the output is what the rounded values have."""
    x = (np.random.default_rng(0).normal(size=SHAPE) + 1e4).astype(np.float32)
    y, _ = train(case.module(), x)
    np.testing.assert_allclose(y, case.train(x.astype(np.float64)), atol=0.02)


@EVERY
@pytest.mark.parametrize("shape", [(1, 3, 4), (6, 1, 4), (6, 3, 1), (1, 1, 4)], ids=str)
def test_edges_are_finite_in_value_state_and_gradient(case, shape):
    fields = {"num_groups": 1} if case is CASES["hybrid"] else {}
    module = BatchGroupNorm(**fields) if fields else case.module()
    for x in (data(0, shape), np.full(shape, 3.0)):
        y, variables = train(module, x.astype(np.float32))
        assert np.isfinite(y).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
        assert np.isfinite(gradient(module, x.astype(np.float32), np.ones(shape, "f4"))).all()
        assert np.isfinite(module.apply(variables, x.astype(np.float32), train=False)).all()


def test_float16_at_its_limit_is_finite():
    x = np.random.default_rng(0).choice([-6e4, 6e4], SHAPE).astype(np.float16)
    for case in CASES.values():
        if case is CASES["mean only"]:
            continue  # 6e4 less a negative mean is more than float16 holds
        y, variables = train(case.module(), x)
        assert np.isfinite(y).all()
        assert np.isfinite(case.module().apply(variables, x, train=False)).all()


# By hand -----------------------------------------------------------------------------------------


def test_l1_by_hand():
    # 1, 2, 3, 6: mean 3, mean deviation (2 + 1 + 0 + 3)/4 = 1.5; σ = 1.2533141·1.5 = 1.8799712.
    y, variables = train(L1BatchNorm(epsilon=0.0), np.array([[1.0], [2], [3], [6]], "f4"))
    np.testing.assert_allclose(y[:, 0], np.array([-2, -1, 0, 3]) / 1.8799712, rtol=1e-6)
    # 0.9·1 + 0.1·1.8799712
    assert float(variables["batch_stats"]["sigma"][0]) == pytest.approx(1.0879971)


def test_l1_is_batch_normalization_of_gaussian_values_and_of_no_others():
    # Equal parts of ±1: the deviation is 1 by either measure, but √(π/2) = 1.2533 is a Gaussian's.
    x = np.random.default_rng(0).normal(size=(20_000, 1)).astype("f4")
    np.testing.assert_allclose(train(L1BatchNorm(), x)[0], train(BatchNorm(), x)[0], atol=0.05)
    signs = np.array([[-1.0], [1.0]], "f4")
    np.testing.assert_allclose(train(L1BatchNorm(epsilon=0.0), signs)[0], signs / 1.2533141)
    np.testing.assert_allclose(train(BatchNorm(epsilon=0.0), signs)[0], signs)


def test_mean_only_by_hand_and_its_gradient_sums_to_zero():
    y, _ = train(MeanOnlyBatchNorm(), np.array([[1.0], [2], [6]], "f4"))
    np.testing.assert_allclose(y, [[-2], [-1], [3]])
    # dx = dy − mean(dy): of (3, 0, 0), (2, −1, −1).
    found = gradient(MeanOnlyBatchNorm(), np.zeros((3, 1), "f4"), np.array([[3.0], [0], [0]], "f4"))
    np.testing.assert_allclose(found, [[2], [-1], [-1]])


def test_mean_only_has_no_gain_of_its_own():
    variables = MeanOnlyBatchNorm().init(jax.random.key(0), jnp.ones((2, 4)), train=True)
    assert set(variables["params"]) == {"bias"}


@pytest.mark.parametrize(
    ("groups", "ghost", "other"),
    [
        (2, 1, GroupNorm(num_groups=2)),
        (4, 6, BatchNorm()),
        (4, 1, InstanceNorm()),
        (1, 1, LayerNorm(axes="all")),
    ],
)
def test_the_hybrid_has_four_corners(groups, ghost, other):
    x = data(0).astype("f4")
    hybrid = BatchGroupNorm(num_groups=groups, stats_scope="ghost", ghost_size=ghost)
    np.testing.assert_allclose(train(hybrid, x)[0], train(other, x)[0], atol=2e-5)
    between = BatchGroupNorm(num_groups=2, stats_scope="ghost", ghost_size=2)
    assert np.abs(train(between, x)[0] - train(other, x)[0]).max() > 0.05


def test_the_hybrid_refuses_a_grouping_that_does_not_divide_the_channels():
    with pytest.raises(ValueError, match="num_groups 3 does not divide 4 channels"):
        train(BatchGroupNorm(num_groups=3), data(0).astype("f4"))


def test_batch_layer_by_hand():
    # Two examples (1, 3) and (5, 3), two channels, ε ≈ 0. Features: (−1, 1), (1, −1). Batch:
    # channel 1 has mean 3, deviation 2: −1, 1; channel 2 is constant: 0. m = 2:
    # weights 0.4999 and 0.4999; over √2: (−0.9998, 0.4999)/√2, (0.9998, −0.4999)/√2.
    x = np.array([[1.0, 3], [5, 3]], "f4")
    y, variables = train(BatchLayerNorm(epsilon=1e-9), x)
    row = np.array([-0.9998, 0.4999]) / np.sqrt(2)
    np.testing.assert_allclose(y, [row, -row], atol=1e-5)
    assert int(variables["batch_stats"]["batch_size"]) == 2
    # The other sign: 0.4999 and 0.5001.
    y, _ = train(BatchLayerNorm(epsilon=1e-9, delta_sign=1), x)
    np.testing.assert_allclose(y[0], np.array([-1.0, 0.4999]) / np.sqrt(2), atol=1e-5)


def test_a_batch_of_one_is_layer_normalization_but_for_the_weights():
    # m = 1: (1 − 10⁻⁴)·x_f − 10⁻⁴·0, over √4.
    x = data(0)[:1].astype("f4")
    y, variables = train(BatchLayerNorm(), x)
    layer, _ = train(LayerNorm(axes="channel", epsilon=1e-3), x)
    np.testing.assert_allclose(y, (1 - 1e-4) / 2 * layer, atol=1e-6)
    # The variance of one example, 0·1/0, is taken as 0: 0.9·1 + 0.1·0.
    np.testing.assert_allclose(variables["batch_stats"]["var"], 0.9)
    y, _ = train(BatchLayerNorm(), data(0).astype("f4"))
    layer, _ = train(LayerNorm(axes="channel", epsilon=1e-3), data(0).astype("f4"))
    assert np.abs(y - (1 - 1e-4) / 2 * layer).max() > 0.05


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("var", [False, True])
@pytest.mark.parametrize("feature_mean", [False, True])
@pytest.mark.parametrize("feature_var", [False, True])
def test_four_booleans_choose_the_statistics_of_inference(mean, var, feature_mean, feature_var):
    module = BatchLayerNorm(
        population_mean=mean,
        population_var=var,
        population_feature_mean=feature_mean,
        population_feature_var=feature_var,
        use_scale=False,
        use_bias=False,
    )
    random, x = np.random.default_rng(1), data(0)
    state = {
        "mean": random.normal(size=(3, 4)),
        "var": random.uniform(0.5, 2, (3, 4)),
        "feature_mean": random.normal(size=(3, 1)),
        "feature_var": random.uniform(0.5, 2, (3, 1)),
    }
    single = {name: value.astype("f4") for name, value in state.items()}
    stats = {**single, "batch_size": np.int32(2)}
    found = module.apply({"batch_stats": stats}, x.astype("f4"), train=False)
    batch = (x - (state["mean"] if mean else x.mean(0))) / np.sqrt(
        (state["var"] if var else x.var(0)) + 1e-3
    )
    center = state["feature_mean"] if feature_mean else x.mean(-1, keepdims=True)
    spread = state["feature_var"] if feature_var else x.var(-1, keepdims=True)
    features = (x - center) / np.sqrt(spread + 1e-3)
    exact = ((1 / 2 - 1e-4) * features + (1 / 2 - 1e-4) * batch) / 2
    np.testing.assert_allclose(found, exact, atol=1e-5)


def test_batch_layer_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="delta_sign 0 is not -1 or 1"):
        train(BatchLayerNorm(delta_sign=0), data(0).astype("f4"))
    with pytest.raises(ValueError, match="'sample' is not biased or unbiased"):
        train(BatchLayerNorm(running_variance="sample"), data(0).astype("f4"))

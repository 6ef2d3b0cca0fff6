"""The relatives of batch normalization: by hand, at their limits, at inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_steps import data, train

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


def gradient(module, x, weights):
    """The gradient of Σ weights · y by x, in float64."""
    variables = module.init(jax.random.key(0), x, train=True)

    def loss(x):
        y, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(weights * y)

    return jax.jit(jax.grad(loss))(jnp.asarray(x))


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

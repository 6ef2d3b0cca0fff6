"""Moments, pooling and averages, against numbers made by hand and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from normlab.norms.functional import (
    Moments,
    ema,
    expand_mask,
    mean_square,
    merge_moments,
    moments,
    normalize,
    pool_channels,
    pool_moments,
    rough_mean,
    statistics_dtype,
    unbiased,
)


def column(*values):
    return jnp.asarray(values, jnp.float32)[:, None]


def test_moments_by_hand():
    # 1, 2, 3, 6: mean 12/4 = 3; deviations −2, −1, 0, 3; variance (4 + 1 + 0 + 9)/4 = 3.5.
    found = moments(column(1, 2, 3, 6), (0,))
    assert float(found.count[0, 0]) == 4
    assert float(found.mean[0, 0]) == 3
    assert float(found.var[0, 0]) == 3.5


def test_masked_moments_by_hand():
    # Without the 6: mean 2, variance (1 + 0 + 1)/3 = 2/3.
    found = moments(column(1, 2, 3, 6), (0,), jnp.asarray([[True], [True], [True], [False]]))
    assert float(found.count[0, 0]) == 3
    assert float(found.mean[0, 0]) == pytest.approx(2)
    assert float(found.var[0, 0]) == pytest.approx(2 / 3)


def test_a_mask_without_channels_counts_a_value_for_each_of_them():
    x = jnp.asarray([[[1.0, 3.0], [5.0, 7.0]]])  # [1, 2, 2]
    mask = jnp.asarray([[[True], [False]]])
    found = moments(x, (1, 2), mask)
    assert float(found.count.squeeze()) == 2
    assert float(found.mean.squeeze()) == 2  # (1 + 3)/2
    assert float(found.var.squeeze()) == 1


def test_moments_of_nothing_are_zero_and_finite_and_so_are_their_gradients():
    x, nothing = column(1, 2), jnp.zeros((2, 1), bool)
    found = moments(x, (0,), nothing)
    assert [float(part[0, 0]) for part in (found.count, found.mean, found.var)] == [0, 0, 0]

    def total(x):
        found = moments(x, (0,), nothing)
        return jnp.sum(found.mean + found.var)

    np.testing.assert_array_equal(jax.grad(total)(x), np.zeros((2, 1)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_statistics_are_float32_at_least(dtype):
    found = moments(jnp.ones((4, 2), dtype), (0,))
    assert found.mean.dtype == found.var.dtype == jnp.float32


def test_statistics_of_float64_are_float64():
    with jax.enable_x64(True):
        assert moments(jnp.ones((4, 2), jnp.float64), (0,)).var.dtype == jnp.float64


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating-point values, not uint8"):
        statistics_dtype(jnp.uint8)


# Robust variance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 1, 100, 1e4, -1e4])
@pytest.mark.parametrize("shape", [(4096, 3), (16, 16, 16, 3), (2, 64, 32, 3)], ids=str)
def test_variance_is_accurate_to_one_percent_at_any_mean(ratio, shape):
    noise = np.random.default_rng(0).normal(size=shape)
    x = np.asarray(noise + ratio, np.float32)
    axes = tuple(range(len(shape) - 1))
    exact = x.astype(np.float64).var(axes)
    found = moments(jnp.asarray(x), axes).var.reshape(-1)
    np.testing.assert_allclose(found, exact, rtol=0.01)


def test_the_bare_one_pass_variance_is_not():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4096,)) + 1e4, jnp.float32)
    bare = float(jnp.mean(x * x) - jnp.mean(x) ** 2)
    exact = np.asarray(x, np.float64).var()
    assert abs(bare - exact) / exact > 0.5


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e4, -3e5, 1e15])
def test_a_constant_has_variance_zero_and_never_less(value):
    found = moments(jnp.full((8, 7, 7, 2), value), (0, 1, 2))
    assert np.all(np.asarray(found.var) >= 0)
    # Rounding of the mean leaves at most (eps·|value|)².
    assert np.all(np.asarray(found.var) <= (1e-6 * value) ** 2)


def test_the_shift_may_be_far_from_the_mean_when_the_first_rows_are_not_like_the_rest():
    # Row 0 of each image is at 1e4 and the rest at 0: the bound of `functional.py` at its worst.
    x = np.random.default_rng(0).normal(size=(8, 64, 8, 1)).astype(np.float32)
    x[:, 0] += 1e4
    exact = x.astype(np.float64).var()
    assert float(moments(jnp.asarray(x), (0, 1, 2)).var.squeeze()) == pytest.approx(exact, rel=1e-4)


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30),
    offset=st.floats(-1e4, 1e4, width=32),
)
@settings(max_examples=60)
def test_any_values_at_any_offset_agree_with_float64(values, offset):
    x = np.asarray(values, np.float32) + np.float32(offset)
    found = moments(jnp.asarray(x)[:, None], (0,))
    exact = x.astype(np.float64)
    scale = max(1.0, float(np.abs(x).max()))
    assert float(found.mean[0, 0]) == pytest.approx(exact.mean(), abs=1e-5 * scale)
    # 1% of the variance, or what float32 resolves of the mean, squared.
    assert float(found.var[0, 0]) == pytest.approx(exact.var(), rel=0.01, abs=(1e-5 * scale) ** 2)
    assert float(found.var[0, 0]) >= 0


# Derivatives -------------------------------------------------------------------------------------


def test_the_gradients_are_one_over_m_and_twice_the_deviation_over_m():
    # ∂mean/∂xᵢ = 1/4, ∂var/∂xᵢ = 2(xᵢ − 3)/4: −1, −0.5, 0, 1.5.
    x = column(1, 2, 3, 6)
    of_mean = jax.grad(lambda x: moments(x, (0,)).mean.sum())(x)
    of_var = jax.grad(lambda x: moments(x, (0,)).var.sum())(x)
    np.testing.assert_allclose(of_mean[:, 0], [0.25] * 4)
    np.testing.assert_allclose(of_var[:, 0], [-1, -0.5, 0, 1.5], atol=1e-6)


def test_derivatives_of_normalization_agree_with_differences_forward_and_backward():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (6, 5, 2), jnp.float64)

        def f(x):
            found = moments(x, (0, 1))
            return jnp.sin(normalize(x, found.mean, jax.lax.rsqrt(found.var + 1e-5)))

        check_grads(f, (x,), order=2, modes=("fwd", "rev"))


def test_no_gradient_flows_through_the_shift():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(
        jax.grad(lambda x: rough_mean(x, (0, 1)).sum())(x), np.zeros_like(x)
    )


def test_normalize_is_the_same_for_every_shift():
    x = column(1, 2, 3, 6)
    for shift in (0.0, 3.0, -7.0):
        y = normalize(x, jnp.float32(3), jnp.float32(0.5), shift=jnp.float32(shift))
        np.testing.assert_allclose(y[:, 0], [-1, -0.5, 0, 1.5], atol=1e-6)


# Pooling and averages ----------------------------------------------------------------------------


def test_merging_by_hand():
    # {1, 3} and {5}: means 2 and 5, variances 1 and 0.
    # Union {1, 3, 5}: mean 3, variance (4 + 0 + 4)/3 = 8/3.
    a = Moments(count=jnp.float32(2), mean=jnp.float32(2), var=jnp.float32(1))
    b = Moments(count=jnp.float32(1), mean=jnp.float32(5), var=jnp.float32(0))
    both = merge_moments(a, b)
    assert float(both.count) == 3
    assert float(both.mean) == pytest.approx(3)
    assert float(both.var) == pytest.approx(8 / 3)


def test_merging_is_not_the_mean_of_the_variances():
    a = moments(column(0, 0), (0,))
    b = moments(column(10, 10), (0,))
    assert float((a.var + b.var)[0, 0] / 2) == 0
    assert float(merge_moments(a, b).var[0, 0]) == 25  # values 0, 0, 10, 10 around 5


@given(cut=st.integers(0, 12))
@settings(max_examples=13)
def test_any_split_merges_to_the_whole(cut):
    x = jax.random.normal(jax.random.key(3), (12, 4)) + 5
    first, second = (jnp.arange(12) < cut)[:, None], (jnp.arange(12) >= cut)[:, None]
    both = merge_moments(moments(x, (0,), first), moments(x, (0,), second))
    whole = moments(x, (0,))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), both, whole)


def test_pooling_groups_gives_the_whole():
    x = jax.random.normal(jax.random.key(0), (8, 5))
    groups = moments(x.reshape(4, 2, 5), (1,))
    pooled = pool_moments(groups, (0,))
    whole = moments(x, (0,))
    np.testing.assert_allclose(pooled.mean[0], whole.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled.var[0], whole.var, rtol=1e-5)
    np.testing.assert_array_equal(pooled.count[0], whole.count)


def test_pooling_channels_by_hand():
    # Means 1 and 3, variances 2 and 4: mean 2, variance (2 + 4)/2 + (1 + 1)/2 = 4. Then 0 and 5.
    channels = Moments(
        count=jnp.full((1, 4), 6.0),
        mean=jnp.asarray([[1.0, 3, 0, 0]]),
        var=jnp.asarray([[2.0, 4, 5, 5]]),
    )
    pooled = pool_channels(channels, 2)
    np.testing.assert_array_equal(pooled.mean, [[2, 2, 0, 0]])
    np.testing.assert_array_equal(pooled.var, [[4, 4, 5, 5]])
    np.testing.assert_array_equal(pooled.count, [[12, 12, 12, 12]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("size", [2, 5, 16])
def test_what_is_not_finite_stays_in_its_group_of_channels(bad, size):
    channels = moments(jax.random.normal(jax.random.key(0), (3, 7, 4 * size)), (1,))
    poisoned = channels.replace(mean=channels.mean.at[1, 0, size].set(bad))
    clean, found = pool_channels(channels, 4), pool_channels(poisoned, 4)
    others = np.ones((3, 1, 4 * size), bool)
    others[1, 0, size : 2 * size] = False
    assert not np.isfinite(found.var[~others]).any()
    np.testing.assert_array_equal(found.mean[others], clean.mean[others])
    np.testing.assert_array_equal(found.var[others], clean.var[others])


def test_momentum_weighs_the_old_value():
    # 0.9·10 + 0.1·20 = 11 (PyTorch's momentum of the same name would give 19).
    assert float(ema(jnp.float32(10), jnp.float32(20), 0.9)) == pytest.approx(11)


def test_unbiased_by_hand():
    assert float(unbiased(jnp.float32(3), jnp.float32(4))) == 4  # 3·4/3
    assert float(unbiased(jnp.float32(0), jnp.float32(1))) == 0


def test_mean_square_by_hand():
    assert float(mean_square(column(1, 2, 3), (0,))[0, 0]) == pytest.approx(14 / 3)
    mask = jnp.asarray([[True], [False], [True]])
    assert float(mean_square(column(1, 2, 3), (0,), mask)[0, 0]) == 5


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 1, 1), ()])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="does not fit values of shape"):
        expand_mask(jnp.ones(shape, bool), (2, 4, 4, 3))

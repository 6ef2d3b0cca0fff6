"""Weight norm and (scaled) weight standardization against float64 NumPy from the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from normlab.norms.scaled_weight_standardization import scaled_standardized_weights
from normlab.norms.weight_centering import centered_weights
from normlab.norms.weight_norm import data_dependent_start, normalized_weights, weight_norms
from normlab.norms.weight_standardization import standardized_weights

SHAPES = pytest.mark.parametrize(
    "shape", [(3, 3, 2, 5), (1, 1, 7, 4), (6, 3), (5, 3, 2), (2, 3, 1, 2, 3)], ids=str
)
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2), ("float16", 2e-3)]
)


def kernel_of(shape, seed=0):
    return np.random.default_rng(seed).normal(0.3, 0.7, shape)


def gain_of(shape):
    return np.linspace(0.5, 2.0, shape[-1])


def over_units(function, kernel, gain):
    """Applies a function of one unit's weights [N] and gain to each unit."""
    flat = kernel.reshape(-1, kernel.shape[-1])
    units = [function(flat[:, i], gain[i]) for i in range(flat.shape[1])]
    return np.stack(units, -1).reshape(kernel.shape)


def wn(v, g):  # eq. 2
    return g * v / np.sqrt(v @ v)


def ws(ddof):
    return lambda w, _: (w - w.mean()) / (np.std(w, ddof=ddof) + 1e-5)


def sws(floor):  # DeepMind
    return lambda w, g: g * (w - w.mean()) / np.sqrt(max(w.var() * w.size, floor))


def sws_added(w, g):  # timm
    return g * (w - w.mean()) / np.sqrt((w.var() + 1e-5) * w.size)


METHODS = {
    "weight_norm": (normalized_weights, wn),
    "ws_biased": (lambda k, g: standardized_weights(k), ws(0)),
    "sws_no_epsilon": (lambda k, g: scaled_standardized_weights(k, g, 0.0), sws(0.0)),
    "ws_unbiased": (lambda k, g: standardized_weights(k, "unbiased"), ws(1)),
    "sws_floor": (scaled_standardized_weights, sws(1e-4)),
    "sws_added": (lambda k, g: scaled_standardized_weights(k, g, 1e-5, "added"), sws_added),
}
METHODS = {name: (jax.jit(ours), paper) for name, (ours, paper) in METHODS.items()}
EVERY = pytest.mark.parametrize("name", METHODS)
CENTERED = pytest.mark.parametrize("name", [name for name in METHODS if name != "weight_norm"])


@EVERY
@SHAPES
def test_weights_equal_the_papers(name, shape):
    ours, paper = METHODS[name]
    with jax.enable_x64(True):
        found = ours(jnp.asarray(kernel_of(shape)), jnp.asarray(gain_of(shape)))
    np.testing.assert_allclose(
        found, over_units(paper, kernel_of(shape), gain_of(shape)), rtol=1e-12, atol=1e-12
    )


@EVERY
@DTYPES
def test_weights_are_float32_at_least_and_near_the_exact_ones(name, dtype, tolerance):
    ours, paper = METHODS[name]
    shape = (3, 3, 4, 5)
    kernel, gain = jnp.asarray(kernel_of(shape), dtype), jnp.asarray(gain_of(shape), "float32")
    found = ours(kernel, gain)
    assert found.dtype == jnp.float32
    exact = over_units(paper, np.asarray(kernel, np.float64), np.asarray(gain, np.float64))
    # Statistics of the rounded kernel are exact to float32, whatever the kernel's own dtype.
    np.testing.assert_allclose(found, exact, atol=3e-6)
    unrounded = over_units(paper, kernel_of(shape), gain_of(shape))
    np.testing.assert_allclose(found, unrounded, atol=tolerance * np.abs(unrounded).max())


@EVERY
@pytest.mark.parametrize("shape", [(2, 2, 2, 3), (5, 1), (2, 2, 1, 2, 2)], ids=str)
def test_gradients_by_kernel_and_gain_equal_finite_differences(name, shape):
    _, paper = METHODS[name]
    kernel, gain, direction = kernel_of(shape), gain_of(shape), kernel_of(shape, 2)
    with jax.enable_x64(True):
        found = gradients_of(name, jnp.asarray(kernel), jnp.asarray(gain))
    for index, values in enumerate((kernel, gain)):
        expected, h = np.zeros(values.shape), 1e-6
        for place in np.ndindex(values.shape):
            step = np.zeros(values.shape)
            step[place] = h
            ends = []
            for moved in (values + step, values - step):
                point = (moved, gain) if index == 0 else (kernel, moved)
                ends.append(np.sum(direction * over_units(paper, *point)))
            expected[place] = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(found[index], expected, rtol=1e-6, atol=1e-8)


@EVERY
@settings(max_examples=10)
@given(
    values=arrays(np.float64, (3, 2, 4), elements=st.floats(-10, 10, width=32)),
    offset=st.floats(-10, 10),
)
def test_any_weights_equal_the_papers(name, values, offset):
    """Units of equal weights or of zeros have no direction: there the module says what it does."""
    kernel = values + offset
    flat = kernel.reshape(-1, 4)
    size = np.linalg.norm(flat, axis=0) if name == "weight_norm" else flat.std(0)
    usable = size > 1e-3
    with jax.enable_x64(True):
        found = METHODS[name][0](jnp.asarray(kernel), jnp.asarray(gain_of((4,))))
    assert np.isfinite(found).all()
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = over_units(METHODS[name][1], kernel, gain_of((4,)))
    np.testing.assert_allclose(found[..., usable], expected[..., usable], rtol=1e-9, atol=1e-9)


def test_weight_norm_by_hand():
    # v = (3, 4): norm 5; with g = 10, w = (6, 8). Equation 3 for ∂L/∂w = (1, 0):
    # ∂L/∂g = 3/5; ∂L/∂v = (10/5)·((1, 0) − (3/5)(3/5, 4/5)) = (1.28, −0.96), orthogonal to v.
    v, g = jnp.array([[3.0], [4.0]]), jnp.array([10.0])
    np.testing.assert_allclose(normalized_weights(v, g).ravel(), [6.0, 8.0], rtol=1e-6)
    by_v, by_g = jax.grad(lambda v, g: normalized_weights(v, g)[0, 0], (0, 1))(v, g)
    np.testing.assert_allclose(by_v.ravel(), [1.28, -0.96], rtol=1e-5)
    np.testing.assert_allclose(by_g, [0.6], rtol=1e-6)
    np.testing.assert_allclose(weight_norms(v), [5.0], rtol=1e-6)


def test_standardization_by_hand():
    # (1, 2, 3, 6): mean 3, squares of deviations 4 + 1 + 0 + 9 = 14; σ² = 3.5, unbiased 14/3.
    w = jnp.array([1.0, 2.0, 3.0, 6.0]).reshape(4, 1)
    deviations = np.array([-2.0, -1.0, 0.0, 3.0])
    for found, sigma in (
        (standardized_weights(w, epsilon=0.0), np.sqrt(3.5)),
        (standardized_weights(w, "unbiased", 0.0), np.sqrt(14 / 3)),
        (standardized_weights(w, epsilon=1.0), np.sqrt(3.5) + 1),  # outside the root
        # N = 4: √(σ²·N) = √14; gain 2.
        (scaled_standardized_weights(w, jnp.array([2.0])), np.sqrt(14) / 2),
        # A floor of 100 is above 14: the divisor is 10. Added, it is √((3.5 + 100)·4) = √414.
        (scaled_standardized_weights(w, jnp.ones(1), 100.0), 10.0),
        (scaled_standardized_weights(w, jnp.ones(1), 100.0, "added"), np.sqrt(414)),
    ):
        np.testing.assert_allclose(found.ravel(), deviations / sigma, rtol=1e-5, atol=1e-6)


def test_the_two_variances_differ_by_the_root_of_n_over_n_minus_one():
    kernel = jnp.asarray(kernel_of((3, 3, 2, 4)), jnp.float32)  # fan-in 18
    biased, other = (standardized_weights(kernel, kind, 0.0) for kind in ("biased", "unbiased"))
    np.testing.assert_allclose(biased / other, np.full(kernel.shape, np.sqrt(18 / 17)), rtol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def gradients_of(name, kernel, gain):
    """By kernel and by gain."""
    upstream = jnp.asarray(kernel_of(kernel.shape, 2), kernel.dtype)
    return jax.grad(lambda k, g: jnp.sum(upstream * METHODS[name][0](k, g)), (0, 1))(kernel, gain)


def gradient_of(name, kernel, gain):
    return gradients_of(name, kernel, gain)[0]


@EVERY
def test_gradients_are_orthogonal_to_the_weights_of_each_unit(name):
    with jax.enable_x64(True):
        kernel, gain = jnp.asarray(kernel_of((3, 3, 2, 4))), jnp.asarray(gain_of((4,)))
        along = jnp.sum(kernel * gradient_of(name, kernel, gain), (0, 1, 2))
    # ε stands beside σ ≈ 0.7, so a method that has one not under a floor is off by ε/σ.
    exact = name in ("weight_norm", "sws_floor", "sws_no_epsilon")
    assert np.abs(np.asarray(along)).max() < (1e-12 if exact else 1e-3)


@CENTERED
def test_gradients_sum_to_zero_over_the_fan_in_under_centering(name):
    with jax.enable_x64(True):
        kernel, gain = jnp.asarray(kernel_of((3, 3, 2, 4))), jnp.asarray(gain_of((4,)))
        sums = jnp.sum(gradient_of(name, kernel, gain), (0, 1, 2))
        other = jnp.sum(gradient_of("weight_norm", kernel, gain), (0, 1, 2))
    np.testing.assert_allclose(sums, np.zeros(4), atol=1e-12)
    assert np.abs(np.asarray(other)).min() > 1e-3  # weight norm does not center


@EVERY
def test_invariances_of_the_weights(name):
    with jax.enable_x64(True):
        kernel, gain = jnp.asarray(kernel_of((3, 3, 2, 4))), jnp.asarray(gain_of((4,)))
        ours = METHODS[name][0]
        plain = ours(kernel, gain)
        scaled = ours(kernel * jnp.array([2.0, 0.5, 3.0, 7.0]), gain)  # each unit by its own
        np.testing.assert_allclose(scaled, plain, rtol=1e-3)
        moved = ours(kernel + jnp.array([1.0, -2.0, 3.0, 0.5]), gain)
        assert bool(jnp.allclose(moved, plain, atol=1e-9)) == (name != "weight_norm")
        # Not every change is undone: other inputs' weights, scaled apart, are another direction.
        assert not jnp.allclose(ours(kernel.at[0].multiply(2.0), gain), plain, rtol=1e-3)


@EVERY
@pytest.mark.parametrize("value", [0.0, 1e4, 1.0])
def test_equal_weights_are_finite_and_so_is_their_gradient(name, value):
    for shape in ((3, 3, 2, 4), (1, 1)):  # and one input with one unit
        kernel, gain = jnp.full(shape, value), jnp.ones(shape[-1])
        found = METHODS[name][0](kernel, gain)
        assert bool(jnp.isfinite(found).all())
        assert bool(jnp.isfinite(gradient_of(name, kernel, gain)).all())
        if name != "weight_norm" or value == 0:
            np.testing.assert_array_equal(found, np.zeros(shape))


@CENTERED
def test_a_variance_far_from_zero_keeps_its_digits(name):
    """Mean 10⁴ standard deviations off: the plain E[w²] − E[w]² would be off by a factor."""
    kernel = (np.random.default_rng(0).normal(0, 1, (5, 5, 40, 2)) + 1e4).astype(np.float32)
    gain = np.ones(2)
    found = METHODS[name][0](jnp.asarray(kernel), jnp.asarray(gain, jnp.float32))
    exact = over_units(METHODS[name][1], kernel.astype(np.float64), gain)
    assert np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)


def test_a_choice_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"conv\.variance' = 'unbaised'"):
        standardized_weights(jnp.ones((2, 2)), "unbaised")
    with pytest.raises(ValueError, match=r"conv\.epsilon_form' = 'timm'"):
        scaled_standardized_weights(jnp.ones((2, 2)), jnp.ones(2), 1e-5, "timm")


def test_the_data_dependent_start_by_hand():
    # y = g·t = (1, 3) with g = 2: mean 2, variance 1, so g' = 2/1, b' = −2; and a unit of t = 5
    # over the whole batch keeps g = 3 and its bias 0.5.
    y = jnp.array([[1.0, 15.0], [3.0, 15.0]])
    gain, bias, output = data_dependent_start(y, jnp.array([2.0, 3.0]), jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(gain, [2.0, 3.0])
    np.testing.assert_allclose(bias, [-2.0, 0.5])
    np.testing.assert_allclose(output, [[-1.0, 15.5], [1.0, 15.5]])
    # Without a bias the batch is scaled and not moved: (1, 5), variance 4.
    gain, bias, output = data_dependent_start(jnp.array([[1.0], [5.0]]), jnp.array([2.0]), None)
    assert bias is None
    np.testing.assert_allclose(gain, [1.0])
    np.testing.assert_allclose(output, [[0.5], [2.5]])


def test_a_batch_that_is_not_finite_starts_nothing():
    y = jnp.array([[1.0, 2.0], [jnp.inf, 4.0]])
    gain, bias, _ = data_dependent_start(y, jnp.ones(2), jnp.zeros(2))
    np.testing.assert_allclose(gain, [1.0, 1.0])
    np.testing.assert_allclose(bias, [0.0, -3.0])


# Centered weights ---------------------------------------------------------------------------------


def test_centered_weights_by_hand():
    # Units (1, 3) and (0, 4): means 2 and 2.
    got = centered_weights(jnp.array([[1.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(got, [[-1, -2], [1, 2]])


def test_their_gradient_sums_to_zero_and_a_shift_of_a_unit_changes_nothing():
    kernel, dy = (jax.random.normal(jax.random.key(i), (3, 3, 2, 4)) for i in (0, 1))
    gradient = jax.grad(lambda k: jnp.sum(centered_weights(k) * dy))(kernel)
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), np.zeros(4), atol=1e-5)
    shifted = centered_weights(kernel + jnp.arange(4.0))
    np.testing.assert_allclose(shifted, centered_weights(kernel), atol=1e-5)
    # Their size stays, where standardization would divide by it.
    assert not np.allclose(centered_weights(2 * kernel), centered_weights(kernel))
    np.testing.assert_allclose(
        centered_weights(2 * kernel), 2 * centered_weights(kernel), atol=1e-5
    )

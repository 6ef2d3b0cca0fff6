"""Predictions for wide random networks: numbers that can be had by hand, or by drawing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.analysis.mean_field import (
    Signal,
    after_layer,
    batch_norm_signals,
    gradient_growth,
    normalizer_free_signals,
    plain_signals,
)
from normlab.models.activations import ACTIVATIONS, relu


def test_the_growth_with_relu_by_hand():
    # E[φ'²] = 1/2 and Var φ = (1 − 1/π)/2.
    assert gradient_growth(relu) == pytest.approx(math.pi / (math.pi - 1), rel=1e-12)


def test_a_linear_network_grows_at_small_batches_alone():
    identity = ACTIVATIONS["identity"]
    assert gradient_growth(identity) == pytest.approx(1, rel=1e-12)
    assert gradient_growth(identity, 8) == 6 / 5
    assert gradient_growth(relu, 8) == gradient_growth(relu)
    with pytest.raises(ValueError, match="no growth factor at a batch of 3"):
        gradient_growth(identity, 3)


@pytest.mark.parametrize(
    ("name", "growth"), [("relu", 1.4669), ("tanh", 1.178), ("silu", 1.212), ("gelu", 1.319)]
)
def test_the_growth_of_the_usual_activations(name, growth):
    assert gradient_growth(ACTIVATIONS[name]) == pytest.approx(growth, abs=6e-4)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_no_activation_is_without_growth(name):
    # Poincaré's inequality for the normal distribution: Var φ ≤ E[φ'²].
    assert gradient_growth(ACTIVATIONS[name]) >= 1 - 1e-12


def test_a_layer_behind_relu_by_hand():
    # E[φ²] = 1/2 and E[φ]² = 1/(2π), times 2.
    signal = after_layer(Signal(0, 1), relu)
    assert signal == pytest.approx((1 / math.pi, 1 - 1 / math.pi), rel=1e-9)


def test_means_and_variances_are_told_apart_by_the_kernel_of_relu():
    """Cho & Saul 2009: E[φ(x)φ(x')] = q (√(1 − c²) + c (π − arccos c)) / 2π at correlation c."""
    q, c = 3.0, 0.4
    expected = q * (math.sqrt(1 - c**2) + c * (math.pi - math.acos(c))) / math.pi
    signal = after_layer(Signal(c * q, (1 - c) * q), relu)
    assert signal.mean_squared == pytest.approx(expected, rel=1e-5)
    assert sum(signal) == pytest.approx(q, rel=1e-5)


def test_a_layer_of_drawn_weights_has_the_signal_that_is_predicted():
    """Tanh has no formula: 2,000 channels, 4,000 values of each, one layer."""
    keys = jax.random.split(jax.random.key(0), 3)
    u, v = jax.random.normal(keys[0], (2000,)), jax.random.normal(keys[1], (4000, 2000))
    x = math.sqrt(0.7) * u + math.sqrt(1.5) * v
    weights = jax.random.normal(keys[2], (2000, 1000)) * math.sqrt(2 / 2000)
    y = np.asarray(jnp.tanh(x) @ weights, np.float64)
    predicted = after_layer(Signal(0.7, 1.5), jnp.tanh)
    # 1,000 squared means are known to √(2/1000) = 4.5%, the variance far better.
    assert np.mean(y.mean(0) ** 2) == pytest.approx(predicted.mean_squared, rel=0.12)
    assert np.mean(y.var(0)) == pytest.approx(predicted.variance, rel=0.03)


def test_without_a_normalizer_the_second_moment_doubles():
    moments = [sum(block.stream) for block in plain_signals([False] * 6)]
    np.testing.assert_allclose(moments, [2, 4, 8, 16, 32, 64], rtol=1e-4)
    # The means take over: rectified values point ever more the same way.
    shares = [block.branch.mean_squared / sum(block.branch) for block in plain_signals([False] * 6)]
    assert shares == sorted(shares)
    # Two layers from c = 0: κ(0) = 1/π, κ(1/π) by the kernel above.
    c = 1 / math.pi
    assert shares[0] == pytest.approx(
        (math.sqrt(1 - c**2) + c * (math.pi - math.acos(c))) / math.pi, rel=1e-4
    )


def test_a_transition_without_a_normalizer_doubles_too_and_starts_from_the_activated_stream():
    [block] = plain_signals([True])
    # Shortcut W φ(x) and branch W φ(W φ(x)), both of second moment 1; κ(0) = 1/π of the first.
    assert sum(block.stream) == pytest.approx(2, rel=1e-4)
    shortcut = block.stream.mean_squared - block.branch.mean_squared
    assert shortcut == pytest.approx(1 / math.pi, rel=1e-6)


def test_batch_norm_adds_one_a_block_and_starts_again_at_a_transition():
    blocks = batch_norm_signals([False, False, True, False])
    # Start 1; each branch 1; the transition's stream is its shortcut's 1 and its branch's 1.
    np.testing.assert_allclose([sum(block.stream) for block in blocks], [2, 3, 2, 3], rtol=1e-9)
    assert blocks[1].stream.mean_squared == pytest.approx(2 / math.pi)
    assert blocks[1].stream.variance == pytest.approx(1 + 2 * (1 - 1 / math.pi))
    last = batch_norm_signals([False], norm_last=True)[0]
    assert (last.branch, last.stream) == ((0, 1), (0, 2))


def test_normalizer_free_variance_is_one_and_alpha_squared_a_block():
    blocks = normalizer_free_signals([True, False, False, True, False], alpha=0.5)
    assert [block.stream.variance for block in blocks] == [1.25, 1.5, 1.75, 1.25, 1.5]
    assert {block.branch for block in blocks} == {(0, 1)}

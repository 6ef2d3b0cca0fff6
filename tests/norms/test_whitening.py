"""Decorrelated and iterative batch normalization: what whitening is, and where it is fragile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from paper_reference import batch, start, stepper

from normlab.norms import BatchNorm, DecorrelatedBatchNorm, IterativeNorm
from normlab.norms.decorrelated import inverse_root
from normlab.norms.functional import merge_moments

BOTH = pytest.mark.parametrize("cls", [DecorrelatedBatchNorm, IterativeNorm])


def batches():
    """Three batches, in which each example and each channel has its own mean and spread."""
    return [np.float32(batch(seed, (4, 3, 3, 4))) for seed in range(3)]


def apply(module, x, mutable=("batch_stats",), **kwargs):
    x = jnp.asarray(x, jnp.float32)
    variables = module.init(jax.random.key(0), x, train=True)
    return module.apply(variables, x, train=True, mutable=list(mutable), **kwargs)


def covariance(y):
    return np.cov(np.asarray(y, np.float64).reshape(-1, y.shape[-1]).T, bias=True)


def converged(cls, **fields):
    return cls(**fields, **({"num_iterations": 12} if cls is IterativeNorm else {}))


@BOTH
def test_outputs_of_a_group_are_uncorrelated_and_those_of_two_groups_are_not(cls):
    x = batches()[0] @ (np.eye(4) + 0.4)
    np.testing.assert_allclose(covariance(apply(converged(cls), x)[0]), np.eye(4), atol=0.02)
    pairs = covariance(apply(converged(cls, group_size=2), x)[0])
    np.testing.assert_allclose(pairs[:2, :2], np.eye(2), atol=0.02)
    assert np.abs(pairs[:2, 2:]).max() > 0.1


@BOTH
def test_one_channel_a_group_is_batch_normalization(cls):
    x = batches()[0] @ (np.eye(4) + 0.4)
    batch, _ = apply(BatchNorm(), x)
    np.testing.assert_allclose(apply(cls(group_size=1), x)[0], batch, atol=2e-5)
    assert np.abs(apply(cls(group_size=2), x)[0] - batch).max() > 0.1


def test_many_iterations_are_the_exact_root_and_one_is_not():
    x = batches()[0] @ (np.eye(4) + 0.4)
    exact = apply(DecorrelatedBatchNorm(), x)[0]
    np.testing.assert_allclose(apply(IterativeNorm(num_iterations=12), x)[0], exact, atol=1e-3)
    assert np.abs(apply(IterativeNorm(num_iterations=1), x)[0] - exact).max() > 0.1


def test_whitening_by_hand():
    # Σ = [[5, 4], [4, 5]]: λ = 9 and 1 along (1, 1) and (1, −1), so W = [[2, −1], [−1, 2]]/3.
    x = [[3.0, 3.0], [-3.0, -3.0], [1.0, -1.0], [-1.0, 1.0]]
    y, _ = apply(DecorrelatedBatchNorm(epsilon=1e-12), x)
    np.testing.assert_allclose(y, np.sign(x), atol=1e-5)


@BOTH
@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_the_covariance_keeps_its_digits_where_the_mean_is_large(cls, mean):
    x = np.float32(np.random.default_rng(0).normal(size=(64, 4, 4, 4)) + mean)
    own, _ = apply(converged(cls), x)
    np.testing.assert_allclose(covariance(own), np.eye(4), atol=0.01)


@BOTH
@pytest.mark.parametrize("shape", [(2, 4), (3, 16), (1, 2, 2, 4)], ids=str)
def test_few_or_equal_values_give_no_nan_in_output_state_and_gradient(cls, shape):
    """More channels than examples leave the covariance singular; ε keeps the root finite."""
    variables = start(cls(), jnp.zeros(shape))
    for x in (np.random.default_rng(0).normal(size=shape), np.full(shape, 3.0), np.zeros(shape)):
        g = np.float32(np.cos(np.arange(x.size)).reshape(shape))
        found = stepper(cls())(variables, np.float32(x), g, None)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_the_root_has_finite_derivatives_at_equal_eigenvalues():
    """d(4I)^(−1/2) along E is −E/(2·4^(3/2)) = −E/16."""
    direction = jnp.asarray([[1.0, 2.0, 0.0], [2.0, -1.0, 0.5], [0.0, 0.5, 3.0]])
    _, slope = jax.jvp(lambda a: inverse_root(a, 1e-5), (4 * jnp.eye(3),), (direction,))
    np.testing.assert_allclose(slope, -direction / 16, atol=1e-6)
    with jax.enable_x64(True):
        # Two equal eigenvalues of three, in axes of their own.
        turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
        matrix = jnp.asarray(turn @ np.diag([2.0, 2.0, 5.0]) @ turn.T)

        def of_symmetric(a):
            return inverse_root((a + a.T) / 2, 1e-9)

        check_grads(of_symmetric, (matrix,), order=1, modes=("fwd", "rev"))


def test_group_sizes_that_do_not_divide_are_refused_or_settled():
    assert DecorrelatedBatchNorm(group_size=16).size_of(6) == 6
    assert DecorrelatedBatchNorm(group_size=4, strict=False).size_of(6) == 3
    note = DecorrelatedBatchNorm(group_size=4, strict=False).note(6)
    assert note == "group_size 4 does not divide 6 channels: groups of 3"
    assert DecorrelatedBatchNorm(group_size=16).note(6) == ""
    with pytest.raises(ValueError, match="group_size 4 does not divide 6 channels"):
        DecorrelatedBatchNorm(group_size=4).size_of(6)


def test_moments_of_two_batches_merge_to_those_of_their_union():
    module, (one, two, _) = DecorrelatedBatchNorm(group_size=2), batches()
    collections = ("batch_stats", "batch_moments")
    parts = [
        apply(module, x, collections)[1]["batch_moments"]["moments"]
        for x in (one, two[:2], np.concatenate([one, two[:2]]))
    ]
    merged = merge_moments(parts[0], parts[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged, parts[2])
    # Not the mean of covariances: the spread of the two means is missing from it.
    mean = (4 * parts[0].covariance + 2 * parts[1].covariance) / 6
    assert np.abs(mean - parts[2].covariance).max() > 0.01


@BOTH
def test_over_an_axis_of_devices_it_is_the_whole_batch(cls):
    x = jnp.asarray(batches()[0])
    whole, state = apply(cls(), x)
    variables = cls().init(jax.random.key(0), x, train=True)
    shared = cls(axis_name="devices")

    def on_device(x):
        return shared.apply(variables, x, train=True, mutable=["batch_stats"])

    y, states = jax.vmap(on_device, axis_name="devices")(x.reshape(2, 2, *x.shape[1:]))
    np.testing.assert_allclose(y.reshape(x.shape), whole, atol=2e-4)
    for name, value in state["batch_stats"].items():
        np.testing.assert_allclose(states["batch_stats"][name][1], value, atol=1e-4)


@BOTH
def test_ghost_groups_are_whitened_apart_and_averaged_with_equal_weight(cls):
    x = batches()[0]
    ghost, state = apply(cls(stats_scope="ghost", ghost_size=2), x)
    halves = [apply(cls(), x[:2]), apply(cls(), x[2:])]
    np.testing.assert_allclose(ghost, np.concatenate([y for y, _ in halves]), atol=2e-4)
    mean = sum(half["batch_stats"]["whitening"] for _, half in halves) / 2
    np.testing.assert_allclose(state["batch_stats"]["whitening"], mean, atol=1e-4)

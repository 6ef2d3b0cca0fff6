"""Batch normalization's averages free of their start, and the example's own weight at inference."""

import jax
import numpy as np
import pytest
from batch_steps import data, train

from normlab.norms import BatchGroupNorm, BatchNorm, InstanceNorm
from normlab.norms.functional import Moments, blend_moments


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_debiased_averages_are_those_of_the_batches_alone(momentum):
    """h ← m·h + (1 − m)·value from zero, divided by 1 − m^t: Haiku's way of saying it."""
    module, variables, raw = BatchNorm(zero_debias=True, momentum=momentum), None, np.zeros((2, 4))
    for seed in range(3):
        x = data(seed)
        _, variables = train(module, x.astype("f4"), variables)
        raw = momentum * raw + (1 - momentum) * np.stack([x.mean((0, 1)), x.var((0, 1))])
        mean, var = raw / (1 - momentum ** (seed + 1))
        np.testing.assert_allclose(variables["batch_stats"]["mean"], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(variables["batch_stats"]["var"], var, rtol=1e-5)
        assert int(variables["batch_stats"]["step"]) == seed + 1


def test_after_one_step_the_debiased_average_is_the_batch_and_the_plain_one_is_not():
    x = data(0).astype("f4")
    debiased, plain = (
        train(BatchNorm(zero_debias=flag), x)[1]["batch_stats"]["mean"] for flag in (True, False)
    )
    np.testing.assert_allclose(debiased, x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(plain, 0.1 * x.mean((0, 1)), rtol=1e-4)


def test_a_batch_of_nothing_is_no_update_of_the_debiased_average():
    _, variables = train(BatchNorm(zero_debias=True), data(0).astype("f4"), mask=np.zeros(6, bool))
    assert int(variables["batch_stats"]["step"]) == 0
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(4))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_at_inference_an_example_weighs_on_the_second_moments(weight):
    module = BatchNorm(inference_weight=weight, use_scale=False, use_bias=False)
    x, random = data(0), np.random.default_rng(1)
    mean, var = random.normal(size=4), random.uniform(0.5, 2, 4)
    state = {"batch_stats": {"mean": mean.astype("f4"), "var": var.astype("f4")}}
    first = (1 - weight) * mean + weight * x.mean(1, keepdims=True)
    second = (1 - weight) * (var + mean**2) + weight * (x**2).mean(1, keepdims=True)
    exact = (x - first) / np.sqrt(second - first**2 + 1e-5)
    found = module.apply(state, x.astype("f4"), train=False)
    np.testing.assert_allclose(found, exact, atol=2e-5)
    # Masked positions have no part in it, and an example without any is left to the running ones.
    mask = np.ones((6, 3), bool)
    mask[0, 2], mask[1] = False, False
    found = module.apply(state, x.astype("f4"), train=False, mask=mask)
    own = module.apply(state, x[:1, :2].astype("f4"), train=False)
    np.testing.assert_allclose(found[:1, :2], own, atol=2e-5)
    np.testing.assert_allclose(found[1], (x[1] - mean) / np.sqrt(var + 1e-5), atol=2e-5)


def test_with_its_whole_weight_an_example_is_instance_normalized():
    x = data(0).astype("f4")
    instance, _ = train(InstanceNorm(), x)
    for weight, same in ((1.0, True), (0.5, False)):
        module = BatchNorm(inference_weight=weight)
        variables = module.init(jax.random.key(0), x, train=True)
        y = module.apply(variables, x, train=False)
        assert np.allclose(y, instance, atol=2e-5) == same


def test_the_weight_1_over_m_expects_the_statistics_of_a_batch_with_the_example_in_it():
    """All 5² batches of two that can be drawn from five examples, and those with a given first."""
    x = data(0, (5, 3, 4)).astype("f4")
    pairs = np.stack([[np.concatenate([a, b]) for b in x] for a in x])
    running_mean, running_var = x.mean((0, 1)), pairs.var(2).mean((0, 1))
    expected_mean, expected_var = pairs.mean(2).mean(1), pairs.var(2).mean(1)
    running = Moments(
        np.ones((5, 4), "f4"), np.tile(running_mean, (5, 1)), np.tile(running_var, (5, 1))
    )
    own = Moments(np.full((5, 4), 3, "f4"), x.mean(1), x.var(1))
    for weight, same in ((1 / 2, True), (0.3, False)):
        found = blend_moments(running, own, weight)
        assert np.allclose(found.mean, expected_mean, rtol=1e-5) == same
        assert np.allclose(found.var, expected_var, rtol=1e-5) == same


def test_the_hybrid_weighs_an_example_by_groups_of_channels():
    # Channels (0, 2) with positions 0 and 2: running E[x] = 1, E[x²] = (0 + 1 + 4 + 1)/2 = 3; own
    # values all 5: E[x] = 5, E[x²] = 25. Half of each: 3, 14; variance 14 − 9 = 5.
    module = BatchGroupNorm(num_groups=1, inference_weight=0.5, epsilon=0.0)
    module = module.copy(use_scale=False, use_bias=False)
    state = {"mean": np.array([0.0, 2], "f4"), "var": np.array([1.0, 1], "f4")}
    y = module.apply({"batch_stats": state}, np.full((1, 3, 2), 5.0, "f4"), train=False)
    np.testing.assert_allclose(y, 2 / np.sqrt(5), rtol=1e-6)

"""Numbers far from 1, for every normalizer: large means, equal values, the largest of float16.

A batch with an infinite value is in `test_contract.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paper_reference import numpy64, start, stepper
from test_papers import EVERY, case_of

SHAPE = (6, 5, 4)
LARGE = 6e4  # float16 ends at 65,504, so squares of such numbers are beyond it


@functools.cache
def made(name):
    """(the case, variables at its start, its compiled step)"""
    case = case_of(name)
    return case, start(case.module, jnp.zeros(SHAPE)), stepper(case.module)


@EVERY
@pytest.mark.parametrize("ratio", [1e4, -1e4])
def test_the_variance_keeps_its_digits_where_the_mean_is_ten_thousand_deviations(name, ratio):
    """1% of the variance is 0.5% of the output, against the equations in double precision."""
    case, variables, step = made(name)
    x = np.float32(np.random.default_rng(0).normal(size=SHAPE) + ratio)
    y, _, _, after, _ = step(variables, x, np.ones_like(x), None)
    params, state = numpy64(variables["params"]), numpy64(variables["batch_stats"])
    expected, state = case.forward(params, state, numpy64(x), None, True)
    # What centers gives numbers near 1, what does not leaves numbers near 10⁴.
    size = np.maximum(1, np.abs(expected).max((0, 1)))
    assert np.abs((np.asarray(y) - expected) / size).max() < 0.005
    for key in {"var", "sigma", "second_moment", "feature_var", "whitening"} & set(state):
        np.testing.assert_allclose(after["batch_stats"][key], state[key], rtol=0.01, err_msg=key)


@EVERY
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_equal_values_give_finite_outputs_states_and_gradients(name, value):
    _, variables, step = made(name)
    x, g = np.full(SHAPE, value, np.float32), np.random.default_rng(0).normal(size=SHAPE)
    for _ in range(2):  # and once more, from the state that the first has left
        found = step(variables, x, np.float32(g), None)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        variables = found[3]


@EVERY
def test_float16_near_its_end_gives_finite_outputs_states_and_gradients(name):
    """One sign in a channel, so that no difference is beyond what the format holds."""
    _, variables, step = made(name)
    random = np.random.default_rng(0)
    x = np.float16(LARGE * random.uniform(0.9, 1, SHAPE) * np.array([1, -1, 1, -1]))
    # Half, as what evaluates by a state near its start passes it on nearly as it is.
    halved = {"scale": jnp.full(4, 0.5)} if "scale" in variables["params"] else {}
    variables = {**variables, "params": {**variables["params"], **halved}}
    found = step(variables, x, np.ones_like(x), None)
    assert found[0].dtype == jnp.float16
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@EVERY
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4)], ids=str)
def test_single_values_give_finite_outputs_states_and_gradients(name, shape):
    module = case_of(name, shape[-1]).module
    variables, step = start(module, jnp.zeros(shape)), stepper(module)
    for x in (np.random.default_rng(0).normal(size=shape), np.zeros(shape)):
        found = step(variables, np.float32(x), np.ones(shape, "f4"), None)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        variables = found[3]

"""Compares a normalizer with a float64 numpy function written from the paper's equation.

Such a reference is `f(params, state, x, mask, train) -> (y, new state)`, all of them numpy.
"""

import jax
import jax.numpy as jnp
import numpy as np

ROUNDING = {"float32": 2e-4, "bfloat16": 3e-2, "float16": 4e-3}  # of outputs near 1


def numpy64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


def batches(shape=(4, 3, 3, 4), count=3):
    """Three batches, in which each example and each channel has its own mean and spread."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.5, 2, (count, shape[0], *[1] * (len(shape) - 2), shape[-1]))
    return (rng.normal(size=(count, *shape)) * spread + rng.normal(size=spread.shape)).astype("f4")


def some_mask(shape=(4, 3, 3)):
    """Four of five values, and none of the last example's but the first."""
    mask = np.random.default_rng(1).uniform(size=shape) < 0.8
    mask[-1] = False
    mask.reshape(shape[0], -1)[:, 0] = True
    return mask


def start(module, x):
    """Returns variables with parameters a little off their initial values."""
    variables = dict(module.init(jax.random.key(0), jnp.asarray(x), train=True))
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda p: jnp.asarray(p + 0.2 * rng.normal(size=p.shape), p.dtype),
        variables.get("params", {}),
    )
    return {**variables, "params": params}


def assert_follows(module, reference, mask=None):
    """Asserts that three training steps, inference after them and the gradient agree."""
    xs = batches()
    variables = start(module, xs[0])
    params, state = numpy64(variables["params"]), numpy64(variables.get("batch_stats", {}))
    train = jax.jit(lambda v, x: module.apply(v, x, train=True, mask=mask, mutable=["batch_stats"]))
    _assert_gradient(module, reference, variables, state, xs[0], mask)
    for x in xs:
        y, updated = train(variables, x)
        expected, state = reference(params, state, x.astype("f8"), mask, True)
        _assert_close(y, expected, mask, ROUNDING["float32"])
        variables = {**variables, **updated}
        for name, value in variables.get("batch_stats", {}).items():
            np.testing.assert_allclose(value, state[name], rtol=1e-4, atol=1e-4)
    y = module.apply(variables, xs[0], train=False, mask=mask)
    expected, _ = reference(params, state, xs[0].astype("f8"), mask, False)
    _assert_close(y, expected, mask, ROUNDING["float32"])


def assert_follows_in(dtype, module, reference):
    """Asserts that outputs agree to the rounding of a short `dtype`, statistics in float32."""
    x = jnp.asarray(batches()[0], dtype)
    variables = start(module, x)
    y, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == dtype
    state = numpy64(variables.get("batch_stats", {}))
    expected, _ = reference(numpy64(variables["params"]), state, numpy64(x), None, True)
    limit = ROUNDING[dtype] * max(1, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=limit)


def _assert_close(y, expected, mask, atol):
    """Compares what counts; a masked position is normalized too, but nothing depends on it."""
    chosen = slice(None) if mask is None else mask
    np.testing.assert_allclose(np.asarray(y)[chosen], expected[chosen], atol=atol, rtol=atol)


def _assert_gradient(module, reference, variables, state, x, mask):
    """Compares slopes along random directions of parameters and input, by central differences."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=x.shape) * (1 if mask is None else mask[..., None])

    def loss(params, x):
        v = {**variables, "params": params}
        y, _ = module.apply(v, x, train=True, mask=mask, mutable=["batch_stats"])
        return jnp.sum(weight * y)

    point = (variables["params"], jnp.asarray(x))
    gradient = numpy64(jax.jit(jax.grad(loss, argnums=(0, 1)))(*point))
    point, step = numpy64(point), 1e-6
    for _ in range(4):
        along = jax.tree.map(lambda p: rng.normal(size=p.shape), point)
        ends = []
        for sign in (1, -1):
            params, moved = jax.tree.map(lambda p, d, s=sign: p + s * step * d, point, along)
            ends.append(np.sum(weight * reference(params, state, moved, mask, True)[0]))
        slopes = jax.tree.map(lambda g, d: np.sum(g * d), gradient, along)
        total = sum(jax.tree.leaves(slopes))
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(total, expected, rtol=2e-3, atol=2e-3)

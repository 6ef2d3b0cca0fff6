"""Compares normalizers with float64 numpy functions written from the papers' equations.

The functions stand in `batch_equations.py`, `example_equations.py` and `backward_equations.py`;
here is what they share, and how a module is held against one of them. All arrays in them are
float64; a mask is boolean, of x's shape without channels, or None.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from normlab.norms import Normalizer, join_state, split_state

ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half the spacing of a format's numbers at 1: what storing a result in it may change."""
SUMS = 2.0**10
"""Roundings that add up in a statistic: sums of at most 2^7 values, times 2^3 for the digits that
the shift (`functional.py`) and the quotients cost."""
QUICKLY = {"xla_backend_optimization_level": 0}  # compiling is nearly all the time that it takes


@dataclasses.dataclass(frozen=True)
class Case:
    """A module and the equations that it stands for."""

    module: Normalizer
    forward: Callable  # (params, state, x, mask, train) -> (y, state after)
    backward: Callable | None = None
    """(params, state, x, mask, g) -> (gradient by params, by x, `backward_...` state after), where
    the paper defines them; else they are the derivatives of `forward`."""
    hold: Callable | None = None
    """(params, state, x, mask) -> `forward` without what no gradient goes through, held there."""


# What the equations share ------------------------------------------------------------------------


def counted(x, mask=None):
    """The values that count, of all examples: [M, C]."""
    return x.reshape(-1, x.shape[-1]) if mask is None else x[mask]


def each_example(x, mask):
    """(example, its values that count); all of its values where none does."""
    for i, example in enumerate(x):
        none = mask is None or not mask[i].any()
        yield example, counted(x[i : i + 1], None if none else mask[i : i + 1])


def affine(params, y):
    return y * params.get("scale", 1) + params.get("bias", 0)


def ghost_of(size):
    """Fields of a module that normalizes each `size` examples apart; all together without one."""
    return {} if size is None else {"stats_scope": "ghost", "ghost_size": size}


def groups_of(count, size):
    """The slices of `count` examples in groups of `size`."""
    size = size or count
    return [slice(first, first + size) for first in range(0, count, size)]


# Data --------------------------------------------------------------------------------------------


def batch(seed, shape, dtype="float64"):
    """Each example and channel with a mean and spread of its own, in numbers that `dtype` has."""
    random = np.random.default_rng(seed)
    spread = random.uniform(0.5, 2, (shape[0], *[1] * (len(shape) - 2), shape[-1]))
    x = random.normal(size=shape) * spread + random.normal(size=spread.shape)
    return rounded(x, dtype)


def rounded(x, dtype):
    return np.asarray(np.asarray(x, jnp.dtype(dtype)), np.float64)


def start(module, x):
    """Variables with parameters a little off their initial values."""
    variables = jax.jit(lambda: module.init(jax.random.key(0), x, train=True))()
    random = np.random.default_rng(2)

    def moved(p):
        return jnp.asarray(p + 0.2 * random.normal(size=p.shape), p.dtype)

    params = jax.tree.map(moved, variables.get("params", {}))
    return {"params": params, "batch_stats": variables.get("batch_stats", {})}


def widened(module):
    """The module with parameters and statistics in double precision."""
    return module.copy(param_dtype="float64") if hasattr(module, "param_dtype") else module


def numpy64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


# The comparison ----------------------------------------------------------------------------------


@functools.cache
def stepper(module):
    """A compiled `step(variables, x, g, mask)` -> (y, gradient by parameters, by x, variables
    after, evaluation under those); g is the loss's gradient by y.
    """

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(variables, x, g, mask):
        backward, others = split_state(variables["batch_stats"])

        def loss(params, x, backward):
            stats = {"params": params, "batch_stats": join_state(others, backward)}
            y, updated = module.apply(stats, x, train=True, mask=mask, mutable=["batch_stats"])
            return jnp.sum(g * y), (y, updated.get("batch_stats", {}))

        slopes, (y, after) = jax.grad(loss, (0, 1, 2), has_aux=True)(
            variables["params"], x, backward
        )
        after = {**variables, "batch_stats": join_state(after, slopes[2])}
        return y, slopes[0], slopes[1], after, module.apply(after, x, train=False, mask=mask)

    return step


def assert_follows(case, shape, dtype, masks=(None,), steps=3, seed=0, room=1):
    """Asserts that outputs, gradients, states and evaluation of consecutive steps agree.

    One run of `steps` batches for each of `masks`, all with the same compiled step. `room` is for
    statistics over few values: where the variance is near 0, ε = 10⁻⁵ alone is the divisor, and
    1/ε is what it makes of a rounding.
    """
    with jax.enable_x64(dtype == "float64"):
        module = widened(case.module) if dtype == "float64" else case.module
        first, step = start(module, jnp.zeros(shape, dtype)), stepper(module)
        for mask in masks:
            variables, state = first, numpy64(first["batch_stats"])
            for number in range(steps):
                x, g = (batch(seed + number + shift, shape, dtype) for shift in (0, 100))
                g = g if mask is None else g * mask[..., None]
                found = step(variables, jnp.asarray(x, dtype), jnp.asarray(g, dtype), mask)
                params, variables = numpy64(variables["params"]), found[3]
                state = _assert_step(case, dtype, room, params, state, x, g, mask, found)


def _assert_step(case, dtype, room, params, state, x, g, mask, found):
    """Compares one step, and returns the reference's state after it."""
    y, by_params, by_x, variables, evaluated = found
    assert y.dtype == by_x.dtype == evaluated.dtype == dtype
    expected, after = case.forward(params, state, x, mask, True)
    chosen = slice(None) if mask is None else mask
    _assert_near(np.asarray(y)[chosen], expected[chosen], dtype, room, "output")
    if case.backward is None:
        forward = case.forward if case.hold is None else case.hold(params, state, x, mask)
        _assert_slopes(forward, params, state, x, g, mask, dtype, room, by_params, by_x)
    else:
        slopes, slope, moved = case.backward(params, state, x, mask, g)
        _assert_near(by_x, slope, dtype, room, "gradient by x")
        for name, value in slopes.items():
            _assert_near(by_params[name], value, _wide(dtype), room, f"gradient by {name}")
        after = {**after, **moved}
    for name, value in variables["batch_stats"].items():
        if name in after:
            _assert_near(value, after[name], _wide(dtype), room, name)
    expected, _ = case.forward(params, after, x, mask, False)
    _assert_near(np.asarray(evaluated)[chosen], expected[chosen], dtype, room, "evaluation")
    return after


def _wide(dtype):
    """The format of statistics and parameters."""
    return "float64" if dtype == "float64" else "float32"


def _assert_near(found, expected, dtype, room, what):
    """Each value to the rounding of its format, and all to that of the statistics."""
    found = np.asarray(found, np.float64)
    size = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(
        found,
        expected,
        rtol=1.01 * ROUNDING[dtype],
        atol=room * SUMS * ROUNDING[_wide(dtype)] * size,
        err_msg=what,
    )


def _assert_slopes(forward, params, state, x, g, mask, dtype, room, by_params, by_x):
    """Compares derivatives along random directions of parameters and input together."""
    random = np.random.default_rng(3)
    gradient, point, step = numpy64((by_params, by_x)), (params, x), 1e-6
    for _ in range(2):
        along = jax.tree.map(lambda p: random.normal(size=p.shape), point)
        ends = []
        for sign in (1, -1):
            moved = jax.tree.map(lambda p, d, s=sign: p + s * step * d, point, along)
            ends.append(np.sum(g * forward(moved[0], state, moved[1], mask, True)[0]))
        terms = [
            np.sum(a * b)
            for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True)
        ]
        size = max(1.0, np.abs(gradient[1]).max() * np.sqrt(x.size))
        # A difference over 2·10⁻⁶ of numbers of 10⁻¹⁶ keeps nine digits. x enters a normalizer in
        # up to four places; the gradient of each is rounded to x's format before they are added.
        limit = max(1e-8 * room, 4 * ROUNDING[dtype], SUMS * ROUNDING[_wide(dtype)]) * size
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(sum(terms), expected, rtol=0, atol=limit, err_msg="slope")

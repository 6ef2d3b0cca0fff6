"""One comparison for all frameworks: outputs, gradients, three updates, there and back.

A layer of another framework is handed over as an object with `load(variables)` and `variables()`,
ours through `normlab.interop`, and `run(x, weight, train) -> (y, gradient of x, gradients of the
parameters)`, ours too, of the loss Σ weight·y, which updates its state if `train`. Channels last.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {2: (8, 6), 3: (4, 5, 6), 4: (4, 3, 5, 6), 5: (3, 2, 3, 2, 6)}
RANKS = tuple(SHAPES)


def batches(shape, count=3):
    """Batches in which examples and channels have means and spreads of their own."""
    rng = np.random.default_rng(len(shape))
    spread = rng.uniform(0.5, 2, (count, shape[0], *[1] * (len(shape) - 2), shape[-1]))
    return (rng.normal(size=(count, *shape)) * spread + rng.normal(size=spread.shape)).astype("f4")


def start(module, x):
    """Our variables, none of them at its initial value."""
    variables = module.init(jax.random.key(0), jnp.asarray(x), train=True)
    rng = np.random.default_rng(7)

    def moved(path, value):
        if value.dtype == jnp.int32:  # updates made: averages of zero-debiased ones depend on it
            return np.array(3, "i4")
        return np.asarray(value + 0.3 * rng.uniform(size=value.shape), "f4")

    return jax.tree_util.tree_map_with_path(moved, variables)


@functools.partial(jax.jit, static_argnames=("module", "train"))
def run(module, variables, x, weight, train):
    """Ours: (output, gradient of x, gradients of the parameters, variables after)."""

    def forward(params, x):
        together = {**variables, "params": params}
        return module.apply(together, x, train=train, mutable=["batch_stats"])

    y, back, updated = jax.vjp(forward, variables.get("params", {}), x, has_aux=True)
    gradients, x_gradient = back(weight)
    return y, x_gradient, gradients, {**variables, **updated}


def assert_agrees(module, theirs, shape, atol=5e-5):
    """Asserts that a layer does what our module does, in training and in evaluation.

    What has no state gets one batch: it is the same in both (`tests/norms/test_contract.py`).
    """
    xs = batches(shape) if module.stateful else batches(shape)[:1]
    weight = np.random.default_rng(8).normal(size=shape).astype("f4")
    ours = start(module, xs[0])
    theirs.load(ours)
    assert_same(theirs.variables(), ours)
    for x in xs:
        found = theirs.run(x, weight, train=True)
        y, x_gradient, gradients, ours = run(module, ours, x, weight, train=True)
        assert_close((y, x_gradient, gradients), found, atol)
        assert_close(ours, theirs.variables(), atol)
    if not module.stateful:
        return
    y, x_gradient, gradients, after = run(module, ours, xs[0], weight, train=False)
    assert_close((y, x_gradient, gradients), theirs.run(xs[0], weight, train=False), atol)
    assert_same(after, ours)
    assert_close(ours, theirs.variables(), atol)


def assert_close(ours, theirs, atol):
    """Asserts that two trees have one structure, and values that differ by rounding alone."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


def assert_same(one, other):
    """Asserts that two trees are the same to the bit, dtypes and shapes included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def assert_argument_round_trip(convert, kind, arguments, shape):
    """Asserts that keywords come back from our fields, and our fields from the keywords."""
    fields = convert.norm_fields(kind, arguments)
    back = convert.norm_arguments(kind, fields, shape[1:])
    for name, value in arguments.items():
        assert back.get(name, value) == value
    assert convert.norm_fields(kind, back) == fields

"""Batches whose channels and examples differ, and a training step of a normalizer on them."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (6, 3, 4)  # examples, positions, channels


def data(seed, shape=SHAPE):
    """Channels and examples with means and spreads of their own."""
    random = np.random.default_rng(seed)
    spread = random.uniform(0.5, 2, (shape[0], *[1] * (len(shape) - 1)))
    return random.normal(size=shape) * spread + random.normal(size=shape[-1]) * 3


def train(module, x, variables=None, mask=None):
    """(output, variables after) of a training step, compiled."""
    x = jnp.asarray(x)
    if variables is None:
        variables = module.init(jax.random.key(0), x, train=True)

    @jax.jit
    def step(variables, x):
        y, updated = module.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        return y, {**variables, **updated}

    return step(variables, x)

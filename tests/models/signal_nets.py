"""Networks without a config, on images of noise, and what their residual blocks show."""

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from normlab.models.conv import StandardConv
from normlab.models.signals import SIGNALS
from normlab.norms import NORMS, NormFactory

TORUS = {"boundary": "circular"}
"""No pixel sees the edge, so variances are those of theory."""


def factory(kind="none"):
    return NormFactory(NORMS[kind], FrozenDict())


def net_of(cls, norm="none", conv=None, **fields):
    return cls(num_classes=10, norm=factory(norm), conv=conv or StandardConv(), **fields)


def noise(seed, shape):
    """Images of mean 0 and variance 1, over all of them exactly.

    With few channels a wide stem's outputs would be correlated, their relus too, and weights of
    mean 0 take that part of the variance away: 0.5% with 3 channels.
    """
    x = jax.random.normal(jax.random.key(seed), shape)
    return (x - x.mean()) / x.std()


def moments(net, seeds, shape, train=False):
    """Returns {block: {"branch" and "stream": (mean over channels of mean², of variance)}}.

    The mean over `seeds` draws of images [N, H, W, C] and weights.
    """

    @jax.jit
    def of_seed(seed):
        x = noise(seed, shape)
        variables = net.init(jax.random.key(seed + 1000), x, train=False)
        _, sown = net.apply(variables, x, train=train, mutable=[SIGNALS, "batch_stats"])
        return {name: {k: split(*v) for k, v in x.items()} for name, x in sown[SIGNALS].items()}

    found = [of_seed(seed) for seed in range(seeds)]
    return jax.tree.map(lambda *each: float(sum(each) / seeds), *found)


def split(x):
    return jnp.mean(jnp.mean(x, (0, 1, 2)) ** 2), jnp.mean(jnp.var(x, (0, 1, 2)))


def signals(net, variables, x, **how):
    """Returns {block: {"branch": array, "stream": array}} of one pass."""
    how = {"train": False, "mutable": [SIGNALS, "batch_stats"]} | how
    _, sown = jax.jit(lambda v, x: net.apply(v, x, **how))(variables, x)
    return {name: {k: v for k, (v,) in x.items()} for name, x in sown[SIGNALS].items()}


def start(net, x):
    return jax.jit(lambda: net.init(jax.random.key(0), x, train=False))()

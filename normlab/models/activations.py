"""Activations by config name, and the gains that give them unit variance.

γ = 1/√Var(g(z)) for z ~ N(0, 1): with it the output of an activation, its mean taken off by scaled
weight standardization, has variance 1 (Brock, De & Smith 2021, arXiv:2101.08692, section 3).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from normlab.errors import UserError, unknown


def relu(x: Array) -> Array:
    """Returns max(x, 0), and NaN for NaN.

    `jax.nn.relu` under jit may turn NaN into 0 on a CPU (its maximum follows C's fmax), and a
    network that has broken down would report a finite loss. The gradient at 0 is 0, as there.
    """
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": relu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "gelu": nn.gelu,  # the tanh form, as JAX and DeepMind's nets have it
    "gelu_erf": functools.partial(nn.gelu, approximate=False),  # as PyTorch and timm's nets
    "silu": nn.silu,
    "elu": nn.elu,
    "leaky_relu": nn.leaky_relu,
    "selu": nn.selu,
    "softplus": nn.softplus,
    "identity": lambda x: x,
}

RELEASED_GAINS = {
    "relu": 1.7139588594436646,
    "gelu": 1.7015043497085571,
    "gelu_erf": 1.7015043497085571,  # timm's: the tanh form's
    "silu": 1.7881293296813965,
    "tanh": 1.5939117670059204,
    "sigmoid": 4.803835391998291,
    "elu": 1.2716004848480225,
    "selu": 1.0008515119552612,
    "softplus": 1.9203323125839233,
    "leaky_relu": 1.70590341091156,
    "identity": 1.0,
}
"""γ as in the official code (deepmind-research/nfnets, base.py): Monte Carlo, 1 to 9·10⁻⁴ high."""


@functools.cache
def normal_quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes z and weights, float64 [800] each: weights @ f(z) is E[f(z)], z ~ N(0, 1).

    Gauss-Legendre on each side of 0, where the usual kinks are; |z| up to 12 leaves out 10⁻³².
    """
    nodes, weights = np.polynomial.legendre.leggauss(400)
    z = 6 * (nodes + 1)
    z, weights = np.concatenate([-z, z]), np.tile(6 * weights, 2)
    return z, weights * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


@functools.cache
def gain(activation: Callable[[Array], Array]) -> float:
    """Returns γ = 1/√Var(g(z)), z ~ N(0, 1), by quadrature in float64."""
    z, weights = normal_quadrature()
    # A model asks while it is traced; γ is a number all the same.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        values = np.asarray(activation(jnp.asarray(z, jnp.float64)), np.float64)
    mean = weights @ values
    return float(1 / np.sqrt(weights @ (values - mean) ** 2))


GAINS = ("exact", "released", "none")


@functools.cache
def scaled(activation: Callable[[Array], Array], kind: str) -> Callable[[Array], Array]:
    """Returns γ·g for an activation g: γ `exact`, as `released`, or `none`, which is g itself.

    Raises UserError for another kind, and for an activation of which no γ was released.
    """
    if kind not in GAINS:
        raise unknown("'model.gain'", kind, GAINS)
    if kind == "none":
        return activation
    if kind == "exact":
        factor = gain(activation)
    else:
        released = {g: RELEASED_GAINS[name] for name, g in ACTIVATIONS.items()}
        if activation not in released:
            raise UserError(
                "config field 'model.gain' = 'released' has no number for this activation; "
                "'exact' has"
            )
        factor = released[activation]
    return lambda x: activation(x) * factor

"""Sharpness-aware minimization (SAM). Foret, Kleiner, Mobahi & Neyshabur 2021, arXiv:2010.01412.

The gradient that is descended is not that at w but that at w + ε̂, with ε̂ = ρ·g/‖g‖ (eq. 2, p = 2)
the step of length ρ along which the loss rises fastest; the Hessian's part is dropped (eq. 3). g is
that of the whole batch (the paper's m is the batch), before any clipping or decay.

`optax.contrib.sam` is the same update (a test compares), but it is given a function that returns
gradients alone, and the training step needs more of either pass: statistics, measures, the guard
against what is not finite. Its gradient of zero gives NaN; here w stays where it is.

The training step takes everything but that gradient from the first pass, at w: the batch statistics
are those of the weights that are evaluated, as with optax's opaque mode. Both passes have the same
dropout.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def ascended(params: Any, gradient: Any, rho: float) -> Any:
    """Returns w + ρ·g/‖g‖, the norm over the whole tree; w where g is zero."""
    norm = optax.tree.norm(gradient)
    factor = rho / jnp.where(norm > 0, norm, 1.0)
    return jax.tree.map(lambda w, g: w + (factor * g).astype(w.dtype), params, gradient)

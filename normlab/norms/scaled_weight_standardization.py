"""Scaled Weight Standardization. Brock, De & Smith 2021, arXiv:2101.08692 (and 2102.06171).

Ŵ = gain · (W − μ)/(σ √N) for each output unit, μ and the biased σ² over its fan-in N: the output of
the layer has the variance of an input of mean square 1, without any statistic of activations. The
gain is learned, a number a unit, and starts at 1.

How σ = 0 is kept away:
* `floor`: 1/√max(σ²·N, ε), ε = 1e-4 (DeepMind's nfnets/base.py). Below the floor the weights are
  scaled by a constant; its gradient is then the gain's and the centering's alone.
* `added`: 1/√((σ² + ε)·N), with 1e-5 or 1e-6 (timm's ScaledStdConv2d, which says so by way of a
  batch_norm over the weights). timm also has the activation's gain γ in this place; here, as in
  DeepMind's code, γ belongs to the activation.
"""

import math

import jax.numpy as jnp
from jax import Array

from normlab.norms.functional import moments, rsqrt_or_zero

EPSILON_FORMS = ("floor", "added")


def scaled_standardized_weights(
    kernel: Array, gain: Array, epsilon: float = 1e-4, epsilon_form: str = "floor"
) -> Array:
    """Returns gain·(W − μ)/(σ√N): kernel [..., inputs, features], gain [features].

    In float32 at least. Raises ValueError for an epsilon_form that is neither floor nor added.
    """
    if epsilon_form not in EPSILON_FORMS:
        raise ValueError(
            f"config field 'conv.epsilon_form' = {epsilon_form!r} is not floor or added"
        )
    found = moments(kernel, tuple(range(kernel.ndim - 1)))
    fan_in = math.prod(kernel.shape[:-1])
    if epsilon_form == "floor":
        square = jnp.maximum(found.var * fan_in, epsilon)
    else:
        square = (found.var + epsilon) * fan_in
    # ε = 0 is allowed, and equal weights are then zero, not NaN.
    return (kernel - found.mean) * (rsqrt_or_zero(square) * gain)

"""Weight Centering. Yan et al. 2020, arXiv:2001.06838 (`CenConv2d` of the official code).

Ŵ = W − μ for each output unit, μ over its fan-in: what is left of weight standardization without
the division. Moving average batch normalization asks for it, which centers no activation itself.
Gradients sum to zero over the fan-in, and adding a constant to a unit's weights changes nothing.
"""

from jax import Array

from normlab.norms.functional import moments


def centered_weights(kernel: Array) -> Array:
    """Returns W − μ in float32 at least: kernel [..., inputs, features]."""
    return kernel - moments(kernel, tuple(range(kernel.ndim - 1))).mean

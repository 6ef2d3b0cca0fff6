"""Weight Standardization. Qiao et al. 2019, arXiv:1903.10520.

Ŵ = (W − μ)/(σ + ε) for each output unit (eq. 6 and 7, numbers unverified), μ and σ over its fan-in.
Gradients reach W through both, so they sum to zero over the fan-in.

The official code comes in two forms, which differ by √(N/(N − 1)), N the fan-in: TensorFlow's and
big_vision's σ is biased (1/N), PyTorch's unbiased (1/(N − 1)); ε = 1e-5 is outside the root in
both. (timm's StdConv2d has the biased variance and 1e-6 inside the root.) A unit of equal weights
becomes zero, with a finite gradient: the root is taken of a positive number always.
"""

import jax.numpy as jnp
from jax import Array

from normlab.norms.functional import moments, unbiased

VARIANCES = ("biased", "unbiased")


def standardized_weights(kernel: Array, variance: str = "biased", epsilon: float = 1e-5) -> Array:
    """Returns the kernel [..., inputs, features] with mean 0 and variance 1 over each fan-in.

    In float32 at least. `epsilon` is added to the standard deviation. Raises ValueError for a
    variance that is neither biased nor unbiased.
    """
    if variance not in VARIANCES:
        raise ValueError(f"config field 'conv.variance' = {variance!r} is not biased or unbiased")
    found = moments(kernel, tuple(range(kernel.ndim - 1)))
    var = unbiased(found.var, found.count) if variance == "unbiased" else found.var
    std = jnp.sqrt(jnp.maximum(var, jnp.finfo(var.dtype).tiny))
    return (kernel - found.mean) / (std + epsilon)

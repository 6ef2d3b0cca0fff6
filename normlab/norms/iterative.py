"""Iterative Normalization (IterNorm). Huang, Zhou, Zhu, Liu & Shao 2019, arXiv:1904.03441.

Whitening by Newton's iteration in place of an eigendecomposition (algorithm 1): with Σ the
covariance plus ε, Σ_N = Σ/tr Σ, P₀ = I and P_k = ½(3 P_{k−1} − P³_{k−1} Σ_N), W = P_T/√(tr Σ). Few
iterations whiten the large directions and leave the small ones: T = 5 as in the paper. With one
channel a group it is batch normalization, with T large decorrelated batch normalization.

P_k is a polynomial in Σ_N, so with Y_k = Σ_N P_k and F = ½(3I − P_{k−1} Y_{k−1}) the same iteration
is P_k = F P_{k−1}, Y_k = Y_{k−1} F. This form is computed: the first one is unstable, and its
rounding errors in float32 grew to order 1 in 12 iterations at a condition number of 15.

The official module's default is a single group of all channels, and it halves a group size that
does not divide them; here the default is 64, and the largest divisor that does not exceed it. Its
default momentum, 0.1 for the new value, is 0.9 here. Gradients are those of the iteration itself,
as there.
"""

from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from normlab.norms.normalizer import Facts
from normlab.norms.whitening import Whitening, product


class IterativeNorm(Whitening):
    """Whitens groups of channels over a group of examples, approximately (Newton)."""

    group_size: int = 64  # channels that are whitened together; fewer if there are no more
    num_iterations: int = 5  # of Newton's method

    facts: ClassVar[Facts] = Facts(
        over="N H W C/G",
        at_inference="running mean and whitening matrix",
        passes=(3, 5),
        equals=(
            "batch_norm in training: group_size 1",
            "decorrelated_batch_norm: num_iterations large",
        ),
    )

    def whitening(self, covariance: Array) -> Array:
        """Returns about covariance^(−1/2), ε being in it: [..., D, D] -> [..., D, D]."""
        trace = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None]
        identity = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)
        root, beside = jnp.broadcast_to(identity, covariance.shape), covariance / trace
        for _ in range(self.num_iterations):
            factor = 1.5 * identity - 0.5 * product(root, beside)
            root, beside = product(factor, root), product(beside, factor)
        return root / jnp.sqrt(trace)

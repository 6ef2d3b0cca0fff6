"""Decorrelated Batch Normalization. Huang, Yang, Lang & Deng 2018, arXiv:1804.08450.

ZCA whitening (eq. 6, algorithm 1): W = V diag(λ)^(−1/2) Vᵀ with Σ + εI = V diag(λ) Vᵀ. With one
channel a group it is batch normalization.

Notes:
* The derivative of the official code has 1/(λ_i − λ_j), which is not finite where two eigenvalues
  are equal. Only the root's divided differences are needed, and those are finite everywhere:
  (λ_i^(−1/2) − λ_j^(−1/2))/(λ_i − λ_j) = −1/(√λ_i √λ_j (√λ_i + √λ_j)). So first derivatives,
  forward and backward, are given here by hand; second ones go through the eigenvectors and are not
  safe.
* With fewer examples than channels in a group Σ is singular, and ε alone keeps W finite (λ ≥ ε,
  hence entries up to ε^(−1/2)); the moving average of W then passes such directions on to
  inference. The official ε is 10⁻⁷, the default here 10⁻⁵.
* The official code's group is half of the channels if nothing is said, 16 in the paper's
  experiments (unverified), and its last group may be smaller; here the groups divide the channels.
* The paper whitens without gain and offset, and adds a gain in some nets: `use_scale`, `use_bias`.
"""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from normlab.norms.normalizer import Facts
from normlab.norms.whitening import Whitening, product


class DecorrelatedBatchNorm(Whitening):
    """Whitens groups of channels over a group of examples, exactly (ZCA)."""

    facts: ClassVar[Facts] = Facts(
        over="N H W C/G",
        at_inference="running mean and whitening matrix",
        passes=(3, 5),
        equals=(
            "batch_norm in training: group_size 1",
            "batch_norm in training: uncorrelated channels",
        ),
    )

    def whitening(self, covariance: Array) -> Array:
        """Returns covariance^(−1/2), ε being in it: [..., D, D] -> [..., D, D]."""
        return inverse_root(covariance, self.epsilon)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def inverse_root(matrix: Array, floor: float) -> Array:
    """Returns matrix^(−1/2), symmetric, of symmetric ones [..., D, D] with eigenvalues ≥ `floor`.

    Eigenvalues that rounding puts below the floor are set to it. First derivatives are finite
    whatever the eigenvalues.
    """
    return _decompose(matrix, floor)[2]


@inverse_root.defjvp
def _inverse_root_jvp(
    floor: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    roots, vectors, inverse = _decompose(primals[0], floor)
    across, down = roots[..., None, :], roots[..., :, None]
    differences = -1 / (across * down * (across + down))
    rotated = product(_transpose(vectors), tangents[0], vectors)
    return inverse, product(vectors, differences * rotated, _transpose(vectors))


def _decompose(matrix: Array, floor: float) -> tuple[Array, Array, Array]:
    """Returns √λ [..., D], the eigenvectors as columns, and matrix^(−1/2)."""
    values, vectors = jnp.linalg.eigh(matrix)
    roots = jnp.sqrt(jnp.maximum(values, floor))
    return roots, vectors, product(vectors / roots[..., None, :], _transpose(vectors))


def _transpose(matrix: Array) -> Array:
    return jnp.swapaxes(matrix, -1, -2)

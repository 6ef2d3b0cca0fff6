"""Batch whitening: what decorrelated and iterative normalization share.

y = W (x − μ) per group of D channels, with W ≈ (Σ + εI)^(−1/2), Σ the biased covariance over the
batch and all positions: the symmetric root (ZCA), which stays as near to x as whitening can. At
inference the moving averages of μ and of W itself stand in, as in both papers and their code.
"""

import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.norms.functional import Moments, affine, statistics_dtype
from normlab.norms.group import divisor, settled
from normlab.norms.groups import BatchNormalizer, group_batch, moving_averages, sow_moments
from normlab.norms.normalizer import output_dtype, scale_and_bias


class Whitening(BatchNormalizer):
    """Whitens groups of channels over a group of examples; running averages at inference.

    A subclass says what the whitening matrix is. State: `mean` [C] and `whitening` [C/D, D, D],
    float32 at least.
    """

    group_size: int = 16  # channels that are whitened together; fewer if there are no more
    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to each channel's variance
    strict: bool = True  # refuse a grouping that does not divide the channels, or settle it

    stateful: ClassVar[bool] = True

    def whitening(self, covariance: Array) -> Array:
        """Returns about covariance^(−1/2), ε being in it: [..., D, D] -> [..., D, D]."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A group of nothing unmasked is normalized by the running statistics and changes no state. A
        statistic that is not finite leaves the whole state as it was. Raises ValueError for a scope
        that does not fit the batch, and if the group size does not divide the channels and `strict`
        is set.
        """
        channels, size = x.shape[-1], self.size_of(x.shape[-1])
        state_dtype = statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), state_dtype)
        matrix = self.variable(
            "batch_stats", "whitening", _identities, channels // size, size, state_dtype
        )
        scale, bias = scale_and_bias(self, (channels,))
        if not train:
            y = _whiten(x[None], mean.value, matrix.value[None])
        else:
            batch = group_batch(self, x, mask, covariance_of=size)
            new = self.state_from_moments(batch.moments)
            old = {"mean": mean.value, "whitening": matrix.value.reshape(-1)}
            lead = batch.moments.mean.shape[:-1]
            flat = {"mean": new["mean"], "whitening": new["whitening"].reshape(*lead, -1)}
            own = {name: batch.unless_empty(flat[name], old[name]) for name in flat}
            matrices = own["whitening"].reshape(lead[0], *matrix.value.shape)
            y = _whiten(batch.values, own["mean"], matrices)
            if not self.is_initializing():
                sow_moments(self, batch)
                averages, _ = moving_averages(self, old, flat, batch, self.momentum)
                mean.value = averages["mean"]
                matrix.value = averages["whitening"].reshape(matrix.value.shape)
        return affine(y.reshape(x.shape), scale, bias).astype(output_dtype(self, x))

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        assert moments.covariance is not None
        identity = jnp.eye(moments.covariance.shape[-1], dtype=moments.covariance.dtype)
        matrix = self.whitening(moments.covariance + self.epsilon * identity)
        return {"mean": moments.mean, "whitening": matrix}

    def size_of(self, channels: int) -> int:
        """Returns the channels in a group, of this many (`group.divisor`)."""
        wish = min(self.group_size, channels)
        return divisor(channels, wish, "group_size", strict=self.strict)

    def note(self, channels: int) -> str:
        """Returns that the groups are settled otherwise than wished; "" if they are not."""
        wish, size = min(self.group_size, channels), self.size_of(channels)
        return settled("group_size", wish, size, channels, f"groups of {size}")


def product(*matrices: Array) -> Array:
    """Returns the product of matrices [..., D, D], none of them rounded to a shorter format."""
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), matrices)


def _identities(groups: int, size: int, dtype: DTypeLike) -> Array:
    return jnp.broadcast_to(jnp.eye(size, dtype=dtype), (groups, size, size))


def _whiten(values: Array, mean: Array, matrices: Array) -> Array:
    """Returns W (values − mean): values [G, N, ..., C], matrices [G, C/D, D, D]."""
    centered = values.astype(statistics_dtype(values.dtype)) - mean
    grouped = centered.reshape(values.shape[0], -1, *matrices.shape[1:3])
    return jnp.einsum("gnci,gcij->gncj", grouped, matrices, precision="highest")

"""Mean-only Batch Normalization. Salimans & Kingma 2016, arXiv:1602.07868, section 3.

y = x − μ_B + b, μ_B per channel over the batch and all positions; at inference the running mean. It
is meant to stand beside weight normalization, whose g is the gain, so there is none here unless
`use_scale` is set. The gradient that goes through has zero mean over the batch (eq. 11).
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.functional import Moments, normalize, statistics_dtype
from normlab.norms.groups import BatchNormalizer, group_batch, moving_averages, sow_moments
from normlab.norms.normalizer import Facts, output_dtype, scale_and_bias


class MeanOnlyBatchNorm(BatchNormalizer):
    """Centers each channel over a group of examples; the running mean at inference.

    State: `mean` [C], float32 at least.
    """

    momentum: float = 0.9  # weight of the old value in the running mean
    use_scale: bool = False  # learn a gain per channel

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="N H W",
        at_inference="running mean",
        passes=(3, 3),
        equals=("batch_norm in training: a batch of deviation 1",),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A group of nothing unmasked is centered by the running mean and changes no state, and a mean
        that is not finite changes none. Raises ValueError for a scope that does not fit the batch.
        """
        channels = x.shape[-1]
        state_dtype = statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), state_dtype)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        one = jnp.ones((), state_dtype)
        if not train:
            return normalize(x, mean.value, one, scale, bias).astype(dtype)

        batch = group_batch(self, x, mask)
        group_mean = batch.unless_empty(batch.moments.mean, mean.value)
        y = normalize(batch.values, group_mean, one, scale, bias, batch.shift)

        if not self.is_initializing():
            sow_moments(self, batch)
            new = {"mean": batch.moments.mean}
            averages, _ = moving_averages(self, {"mean": mean.value}, new, batch, self.momentum)
            mean.value = averages["mean"]
        return y.reshape(x.shape).astype(dtype)

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean}

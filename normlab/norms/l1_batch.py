"""L1 Batch Normalization. Hoffer, Banner, Golan & Soudry 2018, arXiv:1803.01814.

x̂ = (x − μ_B)/(σ_B + ε) with σ_B = √(π/2)·E|x − μ_B| per channel: a Gaussian's standard deviation
from its mean absolute deviation, without a square or a root. Wu et al. 2018, arXiv:1802.09769,
leave out √(π/2), which the gain can absorb. Where ε stands is unverified; with no root to be inside
of, it is added to σ.

A population's σ is not a function of its parts' σ as a variance is of variances. Statistics
recomputed over several batches treat σ² as a variance: exact for one batch, and for Gaussian
values.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.functional import Moments, normalize, statistics_dtype
from normlab.norms.groups import BatchNormalizer, group_batch, moving_averages, sow_moments
from normlab.norms.normalizer import Facts, output_dtype, scale_and_bias

GAUSSIAN = math.sqrt(math.pi / 2)  # standard deviation over mean absolute deviation


class L1BatchNorm(BatchNormalizer):
    """Batch normalization by the mean absolute deviation.

    State: `mean`, `sigma` [C], float32 at least; sigma without epsilon.
    """

    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to the deviation

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="N H W",
        at_inference="running mean and sigma",
        passes=(4, 5),
        equals=("batch_norm up to its epsilon: Gaussian values",),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A group of nothing unmasked is normalized by the running statistics and changes no state. A
        statistic that is not finite leaves the whole state as it was. Raises ValueError for a scope
        that does not fit the batch.
        """
        channels = x.shape[-1]
        state_dtype = statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), state_dtype)
        sigma = self.variable("batch_stats", "sigma", jnp.ones, (channels,), state_dtype)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        if not train:
            inverse = 1 / (sigma.value + self.epsilon)
            return normalize(x, mean.value, inverse, scale, bias).astype(dtype)

        batch = group_batch(self, x, mask)
        deviation = GAUSSIAN * batch.mean_of(jnp.abs(batch.values - batch.moments.mean))
        group_mean = batch.unless_empty(batch.moments.mean, mean.value)
        inverse = 1 / (batch.unless_empty(deviation, sigma.value) + self.epsilon)
        y = normalize(batch.values, group_mean, inverse, scale, bias, batch.shift)

        if not self.is_initializing():
            as_variance = batch.moments.replace(count=batch.local.count, var=jnp.square(deviation))
            sow_moments(self, dataclasses.replace(batch, local=as_variance))
            old = {"mean": mean.value, "sigma": sigma.value}
            new = {"mean": batch.moments.mean, "sigma": deviation}
            averages, _ = moving_averages(self, old, new, batch, self.momentum)
            mean.value, sigma.value = averages["mean"], averages["sigma"]
        return y.reshape(x.shape).astype(dtype)

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean, "sigma": jnp.sqrt(moments.var)}

"""Batch Renormalization. Ioffe 2017, arXiv:1702.03275.

x̂ = (x − μ_B)/σ_B · r + d, with r = clip(σ_B/σ, 1/r_max, r_max) and d = clip((μ_B − μ)/σ, −d_max,
d_max), no gradient through either (algorithm 1); σ_B = √(σ²_B + ε). At inference x̂ = (x − μ)/σ.
The state before the update makes r and d.

Notes:
* The moving average is of σ, not of σ² (several ports keep the variance: then evaluation equals
  BatchNorm's, but r is biased). So at r_max = 1, d_max = 0 training equals BatchNorm and evaluation
  does not: E[σ] ≠ √E[σ²].
* r_max and d_max ramp with the number of updates: 1 and 0 up to `ramp_start_steps`, then linearly
  to their values. The defaults are the paper's, for runs of some 160k steps.
* The paper averages with weight 0.01 for the new value: `momentum=0.99`.
* Measured at each training step, as means over groups and channels: r, |d|, and `clipped`, the part
  of all r and d that lay outside their limits. While r_max = 1 and d_max = 0 that is all of them.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.functional import Moments, affine, normalize, statistics_dtype
from normlab.norms.groups import (
    BatchNormalizer,
    gathers_moments,
    group_batch,
    moving_averages,
    sow_moments,
)
from normlab.norms.normalizer import Facts, measure, output_dtype, scale_and_bias


class BatchRenorm(BatchNormalizer):
    """Batch normalization corrected towards the running statistics, in training too.

    State: `mean`, `sigma` [C], float32 at least, and `step`, int32, the number of updates.
    """

    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to the variance, inside the root
    r_max: float = 3.0  # largest correction of the scale, and its inverse the smallest
    d_max: float = 5.0  # largest correction of the offset, in units of sigma
    ramp_start_steps: int = 5_000  # updates of plain batch normalization (r = 1, d = 0)
    r_ramp_end_steps: int = 40_000  # update at which r_max has its value
    d_ramp_end_steps: int = 25_000  # update at which d_max has its value

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="N H W",
        at_inference="running mean and sigma",
        passes=(3, 5),
        equals=(
            "batch_norm in training: r_max 1 and d_max 0",
            "batch_norm in training: a state that is the batch's",
        ),
    )
    measures: ClassVar[tuple[str, ...]] = ("r", "d", "clipped")
    fractions: ClassVar[Mapping[str, float]] = {
        "ramp_start": 5 / 160,
        "d_ramp_end": 25 / 160,
        "r_ramp_end": 40 / 160,
    }

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
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        if not train:
            return normalize(x, mean.value, 1 / sigma.value, scale, bias).astype(dtype)

        batch = group_batch(self, x, mask)
        new = self.state_from_moments(batch.moments)
        # An empty group has r = 1 and d = 0.
        group_mean = batch.unless_empty(new["mean"], mean.value)
        group_sigma = batch.unless_empty(new["sigma"], sigma.value)
        # Moments gathered for a new state must not be those under the state that they replace.
        r_max, d_max = (1, 0) if gathers_moments(self) else self.limits(step.value)
        wanted_r, wanted_d = group_sigma / sigma.value, (group_mean - mean.value) / sigma.value
        r, d = jnp.clip(wanted_r, 1 / r_max, r_max), jnp.clip(wanted_d, -d_max, d_max)
        r, d = jax.lax.stop_gradient((r, d))
        clipped = (r != wanted_r).astype(r.dtype) / 2 + (d != wanted_d).astype(d.dtype) / 2
        measures = {"r": r, "d": jnp.abs(d), "clipped": clipped}
        measure(self, **{name: batch.mean_over_groups(x) for name, x in measures.items()})
        offset = affine(d, scale, bias)
        y = normalize(batch.values, group_mean, r / group_sigma, scale, offset, batch.shift)

        if not self.is_initializing():
            sow_moments(self, batch)
            old = {"mean": mean.value, "sigma": sigma.value}
            averages, moved = moving_averages(self, old, new, batch, self.momentum)
            mean.value, sigma.value = averages["mean"], averages["sigma"]
            step.value = step.value + moved.astype(jnp.int32)
        return y.reshape(x.shape).astype(dtype)

    def limits(self, step: Array | int) -> tuple[Array, Array]:
        """Returns (r_max, d_max) after `step` updates: 1 and 0 at first, then linear ramps."""
        r = 1 + (self.r_max - 1) * _ramp(step, self.ramp_start_steps, self.r_ramp_end_steps)
        d = self.d_max * _ramp(step, self.ramp_start_steps, self.d_ramp_end_steps)
        return r, d

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean, "sigma": jnp.sqrt(moments.var + self.epsilon)}


def _ramp(step: Array | int, start: int, end: int) -> Array:
    """Returns 0 before `start`, 1 from `end`, linear between."""
    if end <= start:
        return jnp.asarray(step >= start, jnp.float32)
    return jnp.clip((jnp.asarray(step, jnp.float32) - start) / (end - start), 0.0, 1.0)

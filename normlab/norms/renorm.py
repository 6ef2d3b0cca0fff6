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
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.norms.functional import Moments, affine, ema, expand_mask, finite_where_masked
from normlab.norms.groups import (
    average_over_groups,
    group_moments,
    grouping_of,
    sow_moments,
    split,
)
from normlab.norms.parameters import Initializer, output_dtype, scale_and_bias


class BatchRenorm(nn.Module):
    """Batch normalization corrected towards the running statistics, in training too.

    State: `mean`, `sigma` [C] float32 and `step`, int32, the number of updates.
    """

    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to the variance, inside the root
    r_max: float = 3.0  # largest correction of the scale, and its inverse the smallest
    d_max: float = 5.0  # largest correction of the offset, in units of sigma
    ramp_start_steps: int = 5_000  # updates of plain batch normalization (r = 1, d = 0)
    r_ramp_end_steps: int = 40_000  # update at which r_max has its value
    d_ramp_end_steps: int = 25_000  # update at which d_max has its value
    use_scale: bool = True  # learn a gain per channel
    use_bias: bool = True  # learn an offset per channel
    dtype: DTypeLike | None = None  # of the output; none: the input's
    param_dtype: DTypeLike = "float32"  # of scale and bias
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros
    stats_scope: str = "global"  # statistics over: global, device, ghost
    ghost_size: int | None = None  # examples in a group of scope ghost
    axis_name: str | None = None  # device axis under pmap or shard_map
    device_groups: int = 1  # groups of scope device under jit

    stateful: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A group of nothing unmasked is normalized by the running statistics and changes no state, nor
        does a statistic that is not finite. Raises ValueError for a scope that does not fit.
        """
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        sigma = self.variable("batch_stats", "sigma", jnp.ones, (channels,), jnp.float32)
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        if not train:
            x_hat = (x - mean.value) / sigma.value
            return affine(x_hat, scale, bias).astype(dtype)

        mask = expand_mask(mask, x.ndim)
        x = finite_where_masked(x, mask)
        grouping = grouping_of(self, x.shape[0])
        groups = group_moments(x, mask, grouping)
        group_sigma = jnp.sqrt(groups.var + self.epsilon)

        r_max, d_max = self.limits(step.value)
        r = jnp.clip(group_sigma / sigma.value, 1 / r_max, r_max)
        d = jnp.clip((groups.mean - mean.value) / sigma.value, -d_max, d_max)
        r, d = jax.lax.stop_gradient((r, d))
        center, gain = groups.mean, r / group_sigma
        if mask is not None:
            empty = groups.count == 0
            center = jnp.where(empty, mean.value, center)
            gain = jnp.where(empty, 1 / sigma.value, gain)
            d = jnp.where(empty, 0, d)
        y = (split(x, grouping.num_groups) - center) * gain + d

        if not self.is_initializing():
            sow_moments(self, groups, grouping)
            valid = (groups.count > 0) & jnp.isfinite(groups.mean) & jnp.isfinite(group_sigma)
            updated = jnp.zeros((), bool)
            for state, values in ((mean, groups.mean), (sigma, group_sigma)):
                new, seen = average_over_groups(values, valid, grouping)
                state.value = jnp.where(seen, ema(state.value, new, self.momentum), state.value)
                updated |= jnp.any(seen)
            step.value = step.value + updated.astype(jnp.int32)
        return affine(y.reshape(x.shape), scale, bias).astype(dtype)

    def limits(self, step: Array | int) -> tuple[Array, Array]:
        """Returns (r_max, d_max) after `step` updates: 1 and 0 at first, then linear ramps."""
        r = 1 + (self.r_max - 1) * _ramp(step, self.ramp_start_steps, self.r_ramp_end_steps)
        d = self.d_max * _ramp(step, self.ramp_start_steps, self.d_ramp_end_steps)
        return r, d

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean, "sigma": jnp.sqrt(moments.var + self.epsilon)}


def _ramp(step: Array | int, start: int, end: int) -> Array:
    """Returns 0 up to `start`, 1 from `end`, linear between."""
    progress = (jnp.asarray(step, jnp.float32) - start) / max(end - start, 1)
    return jnp.clip(progress, 0.0, 1.0)

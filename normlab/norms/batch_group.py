"""Batch/group normalization, the last of "Four Things Everyone Should Know to Improve Batch
Normalization". Summers & Dinneen 2020, arXiv:1906.03548.

Mean and variance over several examples and a group of channels. One example and G groups are group
normalization, a batch and as many groups as channels are batch normalization. How many examples
there are, the scope says: their `examples_per_group` is the experiment's `batch_stats.ghost_size`.

As in their code, the running averages are per channel, of first and second moments over the whole
batch, and pooled over the channels of a group at inference; so the variance includes the spread of
batch means. There E[x²] itself is the state; here it is the variance, which loses no digits.
`inference_weight` is their "inference example weighing": see `batch.py`.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.examples import weigh_example
from normlab.norms.functional import Moments, normalize, pool_channels, statistics_dtype
from normlab.norms.group import divide_channels, settled_groups
from normlab.norms.groups import BatchNormalizer, group_batch, moving_moments, sow_moments
from normlab.norms.normalizer import Facts, output_dtype, scale_and_bias


class BatchGroupNorm(BatchNormalizer):
    """Normalizes groups of channels over a group of examples; running moments at inference.

    State: `mean`, `var` [C], float32 at least.
    """

    num_groups: int = 32  # groups of channels; ignored if group_size is set
    group_size: int | None = None  # channels in a group, in place of num_groups
    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to the variance, inside the root
    inference_weight: float = 0.0  # of an example's own moments at inference; 0: running ones alone
    strict: bool = True  # refuse a grouping that does not divide the channels, or settle it

    stateful: ClassVar[bool] = True
    averages_groups: ClassVar[bool] = False  # its variance has the spread of the groups' means
    facts: ClassVar[Facts] = Facts(
        over="N H W C/G",
        at_inference="running mean and variance, pooled",
        passes=(3, 5),
        equals=(
            "batch_norm in training: num_groups C",
            "group_norm in training: ghost_size 1",
            "layer_norm in training: num_groups 1 and ghost_size 1",
        ),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A group of nothing unmasked is normalized by the running statistics and changes no state. A
        statistic that is not finite leaves the whole state as it was. Raises ValueError for a scope
        that does not fit the batch, and for groups that do not divide the channels if `strict`.
        """
        channels = x.shape[-1]
        groups = self.groups_of(channels)
        state_dtype = statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), state_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), state_dtype)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        running = Moments(count=jnp.ones_like(mean.value), mean=mean.value, var=var.value)
        if not train:
            if self.inference_weight:
                running = weigh_example(x, mask, mean.value, var.value, self.inference_weight)
            pooled = pool_channels(running, groups)
            inverse_std = jax.lax.rsqrt(pooled.var + self.epsilon)
            return normalize(x, pooled.mean, inverse_std, scale, bias).astype(dtype)

        batch = group_batch(self, x, mask)
        pooled, instead = pool_channels(batch.moments, groups), pool_channels(running, groups)
        group_mean = batch.unless_empty(pooled.mean, instead.mean)
        group_var = batch.unless_empty(pooled.var, instead.var)
        inverse_std = jax.lax.rsqrt(group_var + self.epsilon)
        y = normalize(batch.values, group_mean, inverse_std, scale, bias, batch.shift)

        if not self.is_initializing():
            sow_moments(self, batch)
            mean.value, var.value, _ = moving_moments(
                self, mean.value, var.value, batch, self.momentum
            )
        return y.reshape(x.shape).astype(dtype)

    def groups_of(self, channels: int) -> int:
        """Returns the number of groups for this many channels (see `divide_channels`)."""
        return divide_channels(channels, self.num_groups, self.group_size, strict=self.strict)

    def note(self, channels: int) -> str:
        """Returns that the groups are settled otherwise than wished; "" if they are not."""
        return settled_groups(channels, self.num_groups, self.group_size)

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean, "var": moments.var}

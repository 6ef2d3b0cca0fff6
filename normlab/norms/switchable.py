"""Switchable Normalization. Luo, Ren, Peng, Zhang & Li 2018, arXiv:1806.10779.

y = γ (x − Σ w_k μ_k)/√(Σ w'_k σ²_k + ε) + β over k = instance, layer, batch (eq. 3): w and w' are
the softmax of three learned numbers each, from 1, in this order. Layer means all of an example. At
inference the moving averages stand in for the batch's part.

Departures from the official code:
* Its instance variance is PyTorch's unbiased one, NaN on a single position; here all are biased.
* It keeps batch statistics by moving average (momentum 0.997, from zero) or, its default, sums them
  over a pass with the weights frozen; here as batch normalization does, by moving average from zero
  and one. The other way is this package's recomputed statistics.
* At one position (an mlp) an instance is a single value: its mean is x and its variance 0. The
  official 1-D module mixes layer and batch alone there, with two numbers each, as here.
"""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.examples import group_moments, position_axes, prepare
from normlab.norms.functional import Moments, normalize, statistics_dtype
from normlab.norms.groups import BatchNormalizer, group_batch, moving_averages, sow_moments
from normlab.norms.normalizer import Facts, output_dtype, scale_and_bias


class SwitchableNorm(BatchNormalizer):
    """Normalizes by learned mixtures of instance, layer and batch statistics.

    State: `mean`, `var` [C], float32 at least. Parameters: `scale`, `bias` [C], `mean_weight` and
    `var_weight` [3] (instance, layer, batch; at one position [2], without the first).
    """

    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to the variance, inside the root

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="H W; H W C; N H W",
        at_inference="running mean and variance for N H W",
        passes=(3, 5),
        equals=("instance_norm, layer_norm or batch_norm: one-hot weights",),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A group of nothing unmasked takes the running statistics for the batch's and changes no
        state; an example of nothing unmasked has its own. A statistic that is not finite leaves the
        whole state as it was. Raises ValueError for a scope that does not fit the batch.
        """
        channels = x.shape[-1]
        state_dtype = statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), state_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), state_dtype)
        scale, bias = scale_and_bias(self, (channels,))

        values, example_mask = prepare(x, mask)
        instance, shift = group_moments(self, values, channels, example_mask)
        layer, _ = group_moments(self, values, 1, example_mask)
        batch_mean, batch_var = mean.value, var.value
        if train:
            batch = group_batch(self, x, mask)
            batch_mean = _of_examples(batch.unless_empty(batch.moments.mean, mean.value), shift)
            batch_var = _of_examples(batch.unless_empty(batch.moments.var, var.value), shift)

        means, variances = [layer.mean, batch_mean], [layer.var, batch_var]
        if math.prod(x.shape[axis] for axis in position_axes(x)) > 1:
            means, variances = [instance.mean, *means], [instance.var, *variances]
        mixed_mean = self._mix("mean_weight", means)
        inverse_std = jax.lax.rsqrt(self._mix("var_weight", variances) + self.epsilon)
        y = normalize(values, mixed_mean, inverse_std, scale, bias, shift)

        if train and not self.is_initializing():
            sow_moments(self, batch)
            old = {"mean": mean.value, "var": var.value}
            new = self.state_from_moments(batch.moments)
            averages, _ = moving_averages(self, old, new, batch, self.momentum)
            mean.value, var.value = averages["mean"], averages["var"]
        return y.astype(output_dtype(self, x))

    def _mix(self, name: str, statistics: list[Array]) -> Array:
        """Returns the mixture of statistics by the softmax of the parameter `name`."""
        logits = self.param(name, nn.initializers.ones, (len(statistics),), self.param_dtype)
        weights = jax.nn.softmax(logits)
        return sum(weight * part for weight, part in zip(weights, statistics, strict=True))

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean, "var": moments.var}


def _of_examples(statistic: Array, like: Array) -> Array:
    """Returns a statistic of groups [G, 1, ..., 1, C] for each of their examples [N, 1, ..., C]."""
    return jnp.repeat(statistic, like.shape[0] // statistic.shape[0], 0).reshape(like.shape)

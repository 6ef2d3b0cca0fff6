"""Batch Normalization. Ioffe & Szegedy 2015, arXiv:1502.03167.

x̂ = (x − μ_B) / √(σ²_B + ε), y = γ x̂ + β (algorithm 1), μ_B and the biased σ²_B per channel over the
batch and all positions; at inference the moving averages stand in for them (algorithm 2).

Departures, each a field:
* The paper averages m/(m−1)·σ²_B for inference, as PyTorch does: `running_variance="unbiased"`.
  Flax stores the biased one, and so does the default here.
* The paper is silent on how averages are made; here new = momentum·old + (1 − momentum)·batch, with
  zero and one at the start (PyTorch's momentum is one minus this one).
* `zero_debias=True` gives dm-haiku's averages: after one step they are the batch's own. Haiku keeps
  the raw average and divides it; here the momentum starts at 0 and grows, which is the same, so the
  state is what evaluation uses. (Before any step haiku's variance is 0, here 1.)
* `inference_weight=α` is "inference example weighing" (Summers & Dinneen 2020, arXiv:1906.03548):
  at inference E[x] and E[x²] are (1 − α)·running + α·the example's own. Their code
  averages second moments, so that the running variance includes the spread of batch means; here it
  is the average of batch variances, as in all of this module.
* With α = 1/m this is the correction that EvalNorm is after (Singh & Shrivastava 2019,
  arXiv:1904.06031, which learns its weights; their formula is unverified). An example at inference
  is, in training, one of m whose statistics normalize it, and given that it is among them,
  E[μ_B] = μ_x/m + (1 − 1/m) μ, and E[σ²_B] = (1 − α) V + α σ²_x + α(1 − α)(μ_x − μ)², V being the
  average of batch variances over batches of m: exactly what α = 1/m blends.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.examples import weigh_example
from normlab.norms.functional import (
    Moments,
    debiased_momentum,
    normalize,
    statistics_dtype,
    unbiased,
)
from normlab.norms.groups import BatchNormalizer, group_batch, moving_averages, sow_moments
from normlab.norms.normalizer import Facts, output_dtype, scale_and_bias


class BatchNorm(BatchNormalizer):
    """Normalizes each channel over a group of examples; running averages at inference.

    State: `mean`, `var` [C], float32 at least; with `zero_debias` also `step`, int32, updates made.
    """

    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to the variance, inside the root
    running_variance: str = "biased"  # what is averaged: biased (Flax) or unbiased (paper, PyTorch)
    zero_debias: bool = False  # averages that forget their start: after one step the batch's own
    inference_weight: float = 0.0  # of an example's own moments at inference; 0: running ones alone

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="N H W",
        at_inference="running mean and variance",
        passes=(3, 5),
        equals=("instance_norm in training: ghost_size 1",),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A group of nothing unmasked is normalized by the running statistics and changes no state. A
        statistic that is not finite leaves the whole state as it was. Raises ValueError for a scope
        that does not fit the batch.
        """
        if self.running_variance not in ("biased", "unbiased"):
            raise ValueError(
                f"running_variance {self.running_variance!r} is not biased or unbiased"
            )
        channels = x.shape[-1]
        state_dtype = statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), state_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), state_dtype)
        step = None
        if self.zero_debias:
            step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        if not train:
            at_mean, at_var = mean.value, var.value
            if self.inference_weight:
                weighed = weigh_example(x, mask, at_mean, at_var, self.inference_weight)
                at_mean, at_var = weighed.mean, weighed.var
            inverse_std = jax.lax.rsqrt(at_var + self.epsilon)
            return normalize(x, at_mean, inverse_std, scale, bias).astype(dtype)

        batch = group_batch(self, x, mask)
        group_mean = batch.unless_empty(batch.moments.mean, mean.value)
        group_var = batch.unless_empty(batch.moments.var, var.value)
        inverse_std = jax.lax.rsqrt(group_var + self.epsilon)
        y = normalize(batch.values, group_mean, inverse_std, scale, bias, batch.shift)

        if not self.is_initializing():
            sow_moments(self, batch)
            old = {"mean": mean.value, "var": var.value}
            new = self.state_from_moments(batch.moments)
            momentum: float | Array = self.momentum
            if step is not None:
                momentum = debiased_momentum(self.momentum, (step.value + 1).astype(state_dtype))
            averages, moved = moving_averages(self, old, new, batch, momentum)
            mean.value, var.value = averages["mean"], averages["var"]
            if step is not None:
                step.value = step.value + moved.astype(jnp.int32)
        return y.reshape(x.shape).astype(dtype)

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        if self.running_variance == "unbiased":
            return {"mean": moments.mean, "var": unbiased(moments.var, moments.count)}
        return {"mean": moments.mean, "var": moments.var}

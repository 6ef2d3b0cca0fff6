"""Batch Layer Normalization. Ziaee & Çano 2022, arXiv:2209.08898 (number unverified).

y = γ·[(1/m − δ)·x_f + (1 − (1/m + δ))·x_b]/√d + β, δ = 10⁻⁴, m examples in a batch, d channels:
x_f is normalized over the channels of one position (layer normalization), x_b over the examples
alone, so that each position has a mean and variance of its own, and the input's size is fixed.

Facts of the official code (A2Amir/Batch-Layer-Normalization), and what is chosen here:
* Its layer has the sign of δ as above; its plotting cell and the paper's text have
  (1 − 1/m + δ)·x_b: `delta_sign=1`.
* Population statistics are sums over an epoch, reset at each, times m/(m − 1) for both variances. A
  module knows no epochs: here they are moving averages (statistics recomputed over the data set are
  the epoch's), and only the batch's variance has the correction, since m is not the divisor of the
  other. m = 1 gave NaN; here the corrected variance is then 0.
* Four booleans choose batch or population at inference, its defaults are these. Its population
  statistics of features are kept by place in the batch; here they are averaged over the examples.
* m is baked in. Here it is the number of examples at hand, and inference has the last training
  batch's.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.functional import (
    Moments,
    affine,
    expand_mask,
    finite_where_masked,
    moments,
    normalize,
    statistics_dtype,
    unbiased,
)
from normlab.norms.groups import (
    BatchNormalizer,
    GroupedBatch,
    Grouping,
    group_batch,
    moving_averages,
    sow_moments,
)
from normlab.norms.normalizer import Facts, output_dtype, scale_and_bias

DELTA = 1e-4


class BatchLayerNorm(BatchNormalizer):
    """A mixture of layer and batch normalization, weighted by the inverse of the batch's size.

    State: `mean`, `var` [..., C] of each position, `feature_mean`, `feature_var` [..., 1], float32
    at least; `batch_size`, int32, the examples of a group in the last training batch.
    """

    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-3  # added to the variances, inside the roots
    delta_sign: int = -1  # of 10⁻⁴ in the batch part's weight: -1 (official layer) or 1 (its plots)
    population_mean: bool = True  # inference: the running mean, not that of the batch at hand
    population_var: bool = True  # inference: the running variance, not that of the batch at hand
    population_feature_mean: bool = False  # inference: the running mean of features, not their own
    population_feature_var: bool = False  # inference: their running variance, not their own
    running_variance: str = "unbiased"  # what is averaged of the batch: unbiased (paper) or biased

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="N; C",
        at_inference="running mean and variance; the same for C",
        passes=(3, 5),
        equals=(
            "layer_norm over the channel, times (1 − 10⁻⁴)/√C: a batch of one",
            "batch_norm times (1 − 2·10⁻⁴)/√C: a batch of ten thousand",
        ),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C]; the positions are the state's.

        Where a group has nothing unmasked, its batch part is normalized by the running statistics
        and changes no state. A statistic that is not finite leaves the whole state as it was.
        Raises ValueError for a scope that does not fit the batch, and for a field of no such value.
        """
        if self.delta_sign not in (-1, 1):
            raise ValueError(f"delta_sign {self.delta_sign} is not -1 or 1")
        if self.running_variance not in ("biased", "unbiased"):
            raise ValueError(
                f"running_variance {self.running_variance!r} is not biased or unbiased"
            )
        places, features = x.shape[1:], (*x.shape[1:-1], 1)
        state_dtype = statistics_dtype(self.param_dtype)

        def state(name: str, start: Any, shape: tuple[int, ...], dtype: Any = state_dtype) -> Any:
            return self.variable("batch_stats", name, start, shape, dtype)

        averages = {
            "mean": state("mean", jnp.zeros, places),
            "var": state("var", jnp.ones, places),
            "feature_mean": state("feature_mean", jnp.zeros, features),
            "feature_var": state("feature_var", jnp.ones, features),
        }
        batch_size = state("batch_size", jnp.zeros, (), jnp.int32)
        scale, bias = scale_and_bias(self, x.shape[-1:])
        old = {name: variable.value for name, variable in averages.items()}
        size = jnp.maximum(batch_size.value, 1).astype(state_dtype)

        x = finite_where_masked(x, expand_mask(mask, x.shape))
        own = moments(x, (x.ndim - 1,))
        if train:
            batch = group_batch(self, x, mask, positions_apart=True)
            examples = batch.unless_empty(batch.moments.count, size)
            mean, var = batch.moments.mean, batch.moments.var
            use_mean = use_var = use_feature_mean = use_feature_var = False
        else:
            whole = Grouping(1)
            batch = group_batch(self, x, mask, positions_apart=True, grouping=whole)
            examples = size
            mean, var = batch.moments.mean, batch.moments.var
            use_mean, use_var = self.population_mean, self.population_var
            use_feature_mean = self.population_feature_mean
            use_feature_var = self.population_feature_var
        mean = old["mean"] if use_mean else batch.unless_empty(mean, old["mean"])
        var = old["var"] if use_var else batch.unless_empty(var, old["var"])
        over_batch = normalize(
            batch.values, mean, jax.lax.rsqrt(var + self.epsilon), shift=batch.shift
        )
        over_features = normalize(
            x,
            old["feature_mean"] if use_feature_mean else own.mean,
            jax.lax.rsqrt((old["feature_var"] if use_feature_var else own.var) + self.epsilon),
        )
        share = 1 / examples
        mixed = (share - DELTA) * over_features.reshape(batch.values.shape)
        mixed = mixed + (1 - share + self.delta_sign * DELTA) * over_batch
        y = affine(mixed / jnp.sqrt(x.shape[-1]), scale, bias)

        if train and not self.is_initializing():
            sow_moments(self, batch)
            new = self.state_from_moments(batch.moments) | _feature_averages(batch, own)
            after, moved = moving_averages(self, old, new, batch, self.momentum)
            for name, variable in averages.items():
                variable.value = after[name]
            largest = jnp.max(batch.moments.count).astype(jnp.int32)
            if batch.grouping.axis_name is not None:
                largest = jax.lax.pmax(largest, batch.grouping.axis_name)
            batch_size.value = jnp.where(moved, largest, batch_size.value)
        return y.reshape(x.shape).astype(output_dtype(self, x))

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [..., C].

        Those of the features are not among them: no population moment of a channel tells them.
        """
        if self.running_variance == "unbiased":
            return {"mean": moments.mean, "var": unbiased(moments.var, moments.count)}
        return {"mean": moments.mean, "var": moments.var}


def _feature_averages(batch: GroupedBatch, own: Moments) -> dict[str, Array]:
    """Returns each group's mean over examples of the features' moments, [G, 1, ..., 1]."""

    def average(statistic: Array) -> Array:
        return batch.mean_of(statistic.reshape(*batch.values.shape[:-1], 1))

    return {"feature_mean": average(own.mean), "feature_var": average(own.var)}

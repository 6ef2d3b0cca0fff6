"""EvoNorm-B0. Liu, Brock, Simonyan & Le 2020, arXiv:2004.02967, table 2.

y = x / max(√(s²_B + ε), v x + √(s²_I + ε)) · γ + β with s²_B the variance over batch and positions,
s²_I that over the positions of the example, both per channel, and v per channel from 1: normalizer
and activation in one. At inference a moving average stands in for s²_B.

Notes:
* Where a model has no activation (the last normalizer of a residual branch) the official code
  (`nonlinearity=False`) applies γ and β alone, keeps no state and normalizes nothing; so does this.
* The official code averages the biased variance, as here (timm the unbiased one), from 1.
* ε = 10⁻⁵ is the official code's; timm has 10⁻³.
* At one position (an mlp) s_I is √ε: the batch's part is the normalizer, and v x cuts large values.
* A group of a single value (a batch of one at one position) has no spread, and dividing by √ε would
  blow it up 316 times: 1 stands for its deviation.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.examples import position_axes, prepare
from normlab.norms.functional import Moments, affine, moments, statistics_dtype
from normlab.norms.groups import BatchNormalizer, group_batch, moving_averages, sow_moments, split
from normlab.norms.normalizer import (
    Activation,
    Facts,
    note_nonfinite,
    output_dtype,
    scale_and_bias,
)


class EvoNormB0(BatchNormalizer):
    """Divides x by the larger of the batch's deviation and v x plus the example's.

    State: `var` [C], float32 at least. Parameters: `scale`, `bias` [C], with an activation `v` [C].
    """

    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to the variances, inside the roots
    activation: Activation | None = nn.relu  # the model's, which it replaces whatever it is

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="N H W; H W", at_inference="running variance for N H W", passes=(3, 5)
    )
    replaces_activation: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A group of nothing unmasked is normalized by the running variance and changes no state; an
        example of nothing unmasked has its own. A statistic that is not finite leaves the state as
        it was. Raises ValueError for a scope that does not fit the batch.
        """
        channels = x.shape[-1]
        scale, bias = scale_and_bias(self, (channels,))
        cleaned, example_mask = prepare(x, mask)
        values = cleaned.astype(statistics_dtype(x.dtype))
        if self.activation is None:
            return affine(values, scale, bias).astype(output_dtype(self, x))
        v = self.param("v", nn.initializers.ones, (channels,), self.param_dtype)
        state_dtype = statistics_dtype(self.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), state_dtype)

        instance = moments(cleaned, position_axes(x), example_mask).var
        note_nonfinite(self, jnp.isfinite(instance).all())
        batch_var = var.value
        if train:
            batch = group_batch(self, x, mask)
            values, instance = batch.values, split(instance, batch.grouping.num_groups)
            several = jnp.where(batch.moments.count == 1, 1, batch.moments.var)
            batch_var = batch.unless_empty(several, var.value)
        deviation = jnp.sqrt(batch_var + self.epsilon)
        instance_deviation = jnp.sqrt(instance + self.epsilon)
        y = _divided(values, deviation, v, instance_deviation, scale, bias)

        if train and not self.is_initializing():
            sow_moments(self, batch)
            new = self.state_from_moments(batch.moments)
            averages, _ = moving_averages(self, {"var": var.value}, new, batch, self.momentum)
            var.value = averages["var"]
        return y.reshape(x.shape).astype(output_dtype(self, x))

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"var": moments.var}


@jax.checkpoint  # the gradient makes the divisor again from x
def _divided(
    x: Array,
    deviation: Array,
    v: Array,
    instance_deviation: Array,
    scale: Array | None,
    bias: Array | None,
) -> Array:
    return affine(x / jnp.maximum(deviation, v * x + instance_deviation), scale, bias)

"""Full Normalization. Lian & Liu 2018, arXiv:1810.00177 ("Revisit Batch Normalization").

Batch normalization minimizes E_B[ℓ(F^B)], each loss under its batch's own statistics. Full
normalization minimizes E[ℓ(F^D)], under those of the whole data set D: a nested expectation, whose
inner one a stochastic compositional method estimates by a running average.

No public code was found and the algorithm's text is unverified, so **the update is this project's
own definition**. Two pairs of running estimates, all of the same momentum and free of their start
(`functional.debiased_momentum`), so that the first step is batch normalization:

* of E[x] and E[x²], so of mean μ and variance σ²; after the batch has entered, they normalize it;
* of the loss's derivatives by them, a = ∂ℓ/∂μ and b = ∂ℓ/∂σ², which the backward pass needs:

    ∂ℓ/∂x_i = g_i/√(σ² + ε) + (1/m)·(a + 2(x_i − μ)·b),    g = ∂ℓ/∂x̂.

With the batch's own a and b in their place, the product of two means over the same batch would be
biased by their covariance. If the batch is the data set, all of it is batch normalization, in value
and gradient; if the weights stand still, the mean gradient over batches tends to that of batch
normalization over the data set as the momentum tends to 1.

The statistics are those of the data set, so the scope of batch statistics has no meaning here.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.backward import kept_unless_finite, share_of_mean
from normlab.norms.functional import (
    Moments,
    affine,
    debiased_momentum,
    ema,
    normalize,
    statistics_dtype,
)
from normlab.norms.groups import (
    WholeBatchNormalizer,
    gathers_moments,
    group_batch,
    moving_moments,
    sow_moments,
    summed_over_devices,
    whole_batch,
)
from normlab.norms.normalizer import (
    Facts,
    output_dtype,
    scale_and_bias,
)


class FullNorm(WholeBatchNormalizer):
    """Normalizes each channel by running estimates of the data set's moments, in training too.

    State: `mean`, `var`, `backward_mean`, `backward_var` [C], float32 at least, and `step`, int32,
    the number of updates. The second pair moves only as `backward.py` says.
    """

    momentum: float = 0.9  # weight of the old value in the running estimates
    epsilon: float = 1e-5  # added to the variance, inside the root

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="N H W and past batches",
        at_inference="the same running moments",
        equals=(
            "batch_norm in value and gradient: the batch is the data set",
            "batch_norm in training: momentum 0",
        ),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A batch of nothing unmasked is normalized by the running estimates and changes no state. A
        statistic that is not finite leaves the whole state as it was.
        """
        channels = x.shape[-1]
        state_dtype = statistics_dtype(self.param_dtype)
        shape = (channels,), state_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, *shape)
        var = self.variable("batch_stats", "var", jnp.ones, *shape)
        of_mean = self.variable("batch_stats", "backward_mean", jnp.zeros, *shape)
        of_var = self.variable("batch_stats", "backward_var", jnp.zeros, *shape)
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        if not train:
            inverse_std = jax.lax.rsqrt(var.value + self.epsilon)
            return normalize(x, mean.value, inverse_std, scale, bias).astype(dtype)

        batch = group_batch(self, x, mask, grouping=whole_batch(self))
        momentum = debiased_momentum(self.momentum, (step.value + 1).astype(state_dtype))
        if gathers_moments(self):  # not those under the state that they are to replace
            momentum = 0.0
        new_mean, new_var, moved = moving_moments(self, mean.value, var.value, batch, momentum)
        standard = _standardize(
            batch.grouping.axis_name,
            batch.values.astype(statistics_dtype(x.dtype)),
            new_mean,
            jax.lax.rsqrt(new_var + self.epsilon),
            share_of_mean(batch),
            jnp.where(moved, momentum, 1.0),
            moved,
            of_mean.value,
            of_var.value,
        )
        if not self.is_initializing():
            sow_moments(self, batch)
            mean.value, var.value = new_mean, new_var
            step.value = step.value + moved.astype(jnp.int32)
        return affine(standard, scale, bias).reshape(x.shape).astype(dtype)

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean, "var": moments.var}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _standardize(
    axis_name: str | None,
    x: Array,
    mean: Array,
    inverse_std: Array,
    share: Array,
    momentum: Array,
    moved: Array,
    of_mean: Array,
    of_var: Array,
) -> Array:
    """Returns (x − mean)·inverse_std, [..., C].

    Its gradient by x goes through the moments by the running derivatives `of_mean`, `of_var` [C],
    whose cotangents are their new values, over all devices of the axis.
    """
    return (x - mean) * inverse_std


def _forward(axis_name: str | None, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _standardize(axis_name, *arguments), arguments


def _backward(axis_name: str | None, arguments: tuple[Array, ...], g: Array) -> tuple[Any, ...]:
    x, mean, inverse_std, share, momentum, moved, old_of_mean, old_of_var = arguments
    axes, centered = tuple(range(x.ndim - 1)), x - mean
    by_mean = -inverse_std * summed_over_devices(axis_name, g.sum(axes))
    products = summed_over_devices(axis_name, (g * centered).sum(axes))
    by_var = -(inverse_std**3) / 2 * products
    of_mean, of_var = ema(old_of_mean, by_mean, momentum), ema(old_of_var, by_var, momentum)
    by_x = g * inverse_std + share * (of_mean + 2 * centered * of_var)
    after = kept_unless_finite(moved, (of_mean, of_var), (old_of_mean, old_of_var))
    return by_x.astype(x.dtype), None, None, None, None, None, *after


_standardize.defvjp(_forward, _backward)

"""Power Normalization (PowerNorm). Shen et al. 2020, arXiv:2003.07845, algorithm 2.

x is divided by the root of a running mean of x², without centering, and the one statistic of the
backward pass that is left is a running one too:

    x̂ = x/√(ψ² + ε),    ψ² ← α ψ² + (1 − α) E[x²]    (the old ψ normalizes),
    x̃ = g − ν·x̂,    ∂ℓ/∂x = x̃/√(ψ² + ε),    ν ← ν + (1 − α) E[x̃·x̂].

As in the official code (sIncerass/powernorm): before it each position is divided by the root mean
square of its channels, in `num_groups` groups (`group_scaling`); and during `warmup_steps` the
batch's own E[x²] normalizes and ψ² is the plain mean of all so far. Not as there: it goes on
dividing the *gradient* by the batch's root after the warm-up, where the paper has ψ; and in the
warm-up it takes each batch into ψ² twice.

There is one running mean for the whole batch: the scope of batch statistics has no meaning here.
"""

from collections.abc import Mapping
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
    ema,
    expand_mask,
    finite_where_masked,
    statistics_dtype,
)
from normlab.norms.group import divide_channels, settled_groups
from normlab.norms.groups import (
    WholeBatchNormalizer,
    all_finite,
    gathers_moments,
    group_batch,
    sow_moments,
    summed_over_devices,
    whole_batch,
)
from normlab.norms.normalizer import (
    Facts,
    output_dtype,
    scale_and_bias,
)


class PowerNorm(WholeBatchNormalizer):
    """Divides each channel by a running root mean square, forward and backward.

    State: `second_moment` (ψ²), `backward_projection` (ν) [C], float32 at least, and `step`, int32,
    the number of updates. `backward_projection` moves only as `backward.py` says.
    """

    momentum: float = 0.9  # weight of the old value in the running second moment
    backward_momentum: float = 0.9  # weight of the old value in the backward pass's statistic
    epsilon: float = 1e-5  # added to the second moments, inside the roots
    warmup_steps: int = 10_000  # updates normalized by the batch's own second moment
    group_scaling: bool = True  # first divide by the root mean square of groups of channels
    num_groups: int = 1  # groups of channels of the scaling
    strict: bool = True  # refuse a grouping that does not divide the channels, or settle it

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="C/G; N H W and past batches",
        at_inference="running second moment",
        equals=("moving_average_batch_norm in the warm-up of both: without group_scaling",),
    )
    fractions: ClassVar[Mapping[str, float]] = {"warmup": 1 / 30}  # 10k of 300k steps (unverified)

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A batch of nothing unmasked is divided by the running root mean square and changes no state.
        A statistic that is not finite leaves the whole state as it was. Raises ValueError if the
        groups do not divide the channels and `strict` is set.
        """
        channels = x.shape[-1]
        state_dtype = statistics_dtype(self.param_dtype)
        shape = (channels,), state_dtype
        running = self.variable("batch_stats", "second_moment", jnp.ones, *shape)
        projection = self.variable("batch_stats", "backward_projection", jnp.zeros, *shape)
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        own_mask = expand_mask(mask, x.shape)
        values = finite_where_masked(x, own_mask).astype(statistics_dtype(x.dtype))
        scaling = jnp.zeros(())
        if self.group_scaling:
            values, scaling = self._scaled(values)
            scaling = scaling if own_mask is None else jnp.where(own_mask, scaling, 0)
        if not train:
            y = values * jax.lax.rsqrt(running.value + self.epsilon)
            return affine(y, scale, bias).astype(dtype)

        batch = group_batch(self, values, mask, grouping=whole_batch(self))
        own = batch.mean_of(jnp.square(batch.values)).reshape(-1).astype(state_dtype)
        present = (batch.moments.count > 0).any()
        moved = present & all_finite(
            self, {"second_moment": own, "scaling": scaling}, batch.grouping.axis_name
        )
        count = step.value + 1
        warm = count <= self.warmup_steps
        # Moments gathered for a new state must not be those under the state that they replace.
        by_own = jnp.ones((), bool) if gathers_moments(self) else warm
        square = jnp.where(by_own & present, own, running.value)
        y = _rescale(
            batch.grouping.axis_name,
            batch.values,
            jax.lax.rsqrt(square + self.epsilon),
            share_of_mean(batch),
            jnp.asarray(1 - self.backward_momentum, values.dtype),
            moved,
            projection.value,
        )
        if not self.is_initializing():
            sow_moments(self, batch)
            momentum = jnp.where(warm, 1 - 1 / count.astype(state_dtype), self.momentum)
            average = ema(running.value, own, momentum)
            running.value = jnp.where(moved, average, running.value)
            step.value = step.value + moved.astype(jnp.int32)
        return affine(y, scale, bias).reshape(x.shape).astype(dtype)

    def _scaled(self, x: Array) -> tuple[Array, Array]:
        """Returns x after group scaling, and the mean squares [..., G] that it was divided by."""
        groups = divide_channels(x.shape[-1], self.num_groups, strict=self.strict)
        grouped = x.reshape(*x.shape[:-1], groups, -1)
        square = jnp.square(grouped).mean(-1, keepdims=True)
        return (grouped * jax.lax.rsqrt(square + self.epsilon)).reshape(x.shape), square[..., 0]

    def note(self, channels: int) -> str:
        """Returns that the groups are settled otherwise than wished; "" if they are not."""
        return settled_groups(channels, self.num_groups) if self.group_scaling else ""

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"second_moment": moments.var + jnp.square(moments.mean)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rescale(
    axis_name: str | None,
    x: Array,
    inverse_root: Array,
    share: Array,
    rate: Array,
    moved: Array,
    projection: Array,
) -> Array:
    """Returns x·inverse_root, [..., C].

    Its gradient by x has the running ν, `projection` [C], whose cotangent is its new value; `rate`
    is 1 − α.
    """
    return x * inverse_root


def _forward(axis_name: str | None, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _rescale(axis_name, *arguments), arguments


def _backward(axis_name: str | None, arguments: tuple[Array, ...], g: Array) -> tuple[Any, ...]:
    x, inverse_root, share, rate, moved, projection = arguments
    standard = x * inverse_root
    left = g - jnp.where(share > 0, projection * standard, 0)
    product = (share * left * standard).sum(tuple(range(x.ndim - 1)))
    product = summed_over_devices(axis_name, product)
    after = kept_unless_finite(moved, (projection + rate * product,), (projection,))
    return left * inverse_root, None, None, None, None, *after


_rescale.defvjp(_forward, _backward)

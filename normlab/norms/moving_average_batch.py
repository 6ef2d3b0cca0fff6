"""Moving Average Batch Normalization (MABN). Yan et al. 2020, arXiv:2001.06838.

x is divided by the root of E[x²] over the last K batches, without centering, and the one statistic
that is left in the backward pass is a mean over as many (g is the gradient by the output):

    y = r·z,  z = x/√(χ² + ε),  r = clip(√(χ² + ε)/√(running + ε), 1/5, 5),
    ∂ℓ/∂x = (r·g − z·E[r·g·z])/√(χ² + ε),

χ² and E[r·g·z] means over the window, this batch included. No gradient goes through r. `running` is
a moving average of χ², and inference divides by its root.

As in the official code (megvii-model/MABN): the batch's own statistics as long as the window is not
full or for `warmup_steps`; r = 1 for 1000 steps (both start, in a config, as the parts of a run
that they are of 5,000 steps: they have to do with the memory of the averages); K = 16, for batches
of 2 as if they were of 32. It centers the weights of the convolution before it, too (`CenConv2d`),
which is no part of a normalizer. One window serves the whole batch, so the scope of batch
statistics has no meaning here.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.backward import kept_unless_finite, share_of_mean
from normlab.norms.functional import Moments, affine, ema, statistics_dtype
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


class MovingAverageBatchNorm(WholeBatchNormalizer):
    """Divides each channel by its root mean square over the last batches, forward and backward.

    State: `second_moment` [C], `window`, `backward_window` [K, C], float32 at least, and `step`,
    int32, the number of updates. `backward_window` moves only as `backward.py` says.
    """

    window: int = 16  # batches over which statistics are averaged
    momentum: float = 0.98  # weight of the old value in the running second moment
    epsilon: float = 1e-5  # added to the second moment, inside the root
    warmup_steps: int = 100  # updates with the batch's own statistics
    correction_start_steps: int = 1000  # updates without correction towards the running average
    correction_max: float = 5.0  # largest correction, and its inverse the smallest

    stateful: ClassVar[bool] = True
    fractions: ClassVar[Mapping[str, float]] = {"warmup": 0.02, "correction_start": 0.2}
    facts: ClassVar[Facts] = Facts(
        over="N H W and past batches",
        at_inference="running second moment",
        equals=("filter_response_norm without threshold, in its warm-up: a batch of one",),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        A batch of nothing unmasked is divided by the running root mean square and changes no state.
        A statistic that is not finite leaves the whole state as it was. Raises ValueError for a
        window of less than one batch.
        """
        if self.window < 1:
            raise ValueError(f"window {self.window} is not 1 or more")
        channels = x.shape[-1]
        state_dtype = statistics_dtype(self.param_dtype)

        def state(name: str, start: Any, *shape: int) -> Any:
            return self.variable("batch_stats", name, start, (*shape, channels), state_dtype)

        running = state("second_moment", jnp.ones)
        window = state("window", jnp.zeros, self.window)
        of_products = state("backward_window", jnp.zeros, self.window)
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        values = x.astype(statistics_dtype(x.dtype))
        if not train:
            y = values * jax.lax.rsqrt(running.value + self.epsilon)
            return affine(y, scale, bias).astype(dtype)

        batch = group_batch(self, values, mask, grouping=whole_batch(self))
        own = batch.mean_of(jnp.square(batch.values)).reshape(-1).astype(state_dtype)
        present = (batch.moments.count > 0).any()
        moved = present & all_finite(self, {"second_moment": own})
        count = step.value + 1
        slot, full = count % self.window, (count > self.window) & (count >= self.warmup_steps)
        late = count > max(self.correction_start_steps, self.warmup_steps)
        if gathers_moments(self):  # not those under the state that they are to replace
            full = late = jnp.zeros((), bool)
        filled = window.value.at[slot].set(own)
        square = jnp.where(full, filled.mean(0), own)
        square = jnp.where(present, square, running.value)
        limit = jnp.where(late, self.correction_max, 1.0)
        r = jnp.sqrt((square + self.epsilon) / (running.value + self.epsilon))
        y = _rescale(
            batch.grouping.axis_name,
            batch.values,
            jax.lax.rsqrt(square + self.epsilon),
            jnp.clip(r, 1 / limit, limit),
            share_of_mean(batch),
            slot,
            full,
            moved,
            of_products.value,
        )
        if not self.is_initializing():
            sow_moments(self, batch)
            window.value = jnp.where(moved, filled, window.value)
            average = ema(running.value, square, self.momentum)
            running.value = jnp.where(moved, average, running.value)
            step.value = step.value + moved.astype(jnp.int32)
        return affine(y, scale, bias).reshape(x.shape).astype(dtype)

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"second_moment": moments.var + jnp.square(moments.mean)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rescale(
    axis_name: str | None,
    x: Array,
    inverse_root: Array,
    r: Array,
    share: Array,
    slot: Array,
    full: Array,
    moved: Array,
    of_products: Array,
) -> Array:
    """Returns x·inverse_root·r, [..., C].

    Its gradient by x has the mean over the window of E[r·g·z]; the cotangent of `of_products`
    [K, C] is the window with this batch in its `slot`.
    """
    return x * (inverse_root * r)


def _forward(axis_name: str | None, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _rescale(axis_name, *arguments), arguments


def _backward(axis_name: str | None, arguments: tuple[Array, ...], g: Array) -> tuple[Any, ...]:
    x, inverse_root, r, share, slot, full, moved, of_products = arguments
    z, g = x * inverse_root, g * r
    product = (share * z * g).sum(tuple(range(x.ndim - 1)))
    product = summed_over_devices(axis_name, product)
    filled = of_products.at[slot].set(product.astype(of_products.dtype))
    mean = jnp.where(full, filled.mean(0), product)
    by_x = inverse_root * (g - jnp.where(share > 0, z * mean, 0))
    after = kept_unless_finite(moved, (filled,), (of_products,))
    return by_x, None, None, None, None, None, None, *after


_rescale.defvjp(_forward, _backward)

"""Root Mean Square Layer Normalization. Zhang & Sennrich 2019, arXiv:1910.07467.

y = x / √(mean(x²) + ε) · γ (eq. 4): no centering. The paper has no bias; `use_bias` adds one.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.norms.examples import example_axes
from normlab.norms.functional import affine, expand_mask, finite_where_masked, statistics_dtype
from normlab.norms.parameters import Initializer, output_dtype, scale_and_bias


class RMSNorm(nn.Module):
    """Divides each example (or position) by the root mean square of its features. No state."""

    axes: str = "all"  # statistics over: all (H, W, C of an example) or channel (last axis)
    epsilon: float = 1e-5  # added to the mean square, inside the root
    elementwise: bool = False  # a gain per element instead of per channel
    use_scale: bool = True  # learn a gain
    use_bias: bool = False  # learn an offset; the paper has none
    dtype: DTypeLike | None = None  # of the output; none: the input's
    param_dtype: DTypeLike = "float32"  # of scale and bias
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros

    stateful: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example with nothing unmasked passes with mean square 1.
        """
        axes = example_axes(x.ndim, self.axes)
        shape = tuple(x.shape[axis] for axis in axes) if self.elementwise else x.shape[-1:]
        scale, bias = scale_and_bias(self, shape)
        mask = expand_mask(mask, x.ndim)
        x = finite_where_masked(x, mask)
        values = x.astype(statistics_dtype(x.dtype))
        if mask is None:
            mean_square = jnp.mean(jnp.square(values), axes, keepdims=True)
        else:
            weight = jnp.broadcast_to(mask, x.shape).astype(values.dtype)
            count = jnp.sum(weight, axes, keepdims=True)
            total = jnp.sum(weight * jnp.square(values), axes, keepdims=True)
            mean_square = jnp.where(count > 0, total / jnp.maximum(count, 1), 1)
        y = affine(values * jax.lax.rsqrt(mean_square + self.epsilon), scale, bias)
        return y.astype(output_dtype(self, x))

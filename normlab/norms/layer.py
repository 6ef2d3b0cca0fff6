"""Layer Normalization. Ba, Kiros & Hinton 2016, arXiv:1607.06450.

Mean and variance over the features of one example, the same in training and at inference. Two
meanings are in use, both here: over H, W and C (vision; the "LN" of the Group Normalization paper)
and over the last axis only (transformers; Flax's LayerNorm).

Departure: the paper has a gain and bias per element. Here they are per channel for both meanings,
as is usual for images; `elementwise=True` gives the paper's.
"""

from typing import ClassVar

from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.norms.examples import example_axes, known_moments
from normlab.norms.functional import expand_mask, finite_where_masked, normalize
from normlab.norms.parameters import Initializer, output_dtype, scale_and_bias


class LayerNorm(nn.Module):
    """Normalizes each example (or position) over its own features. No state."""

    axes: str = "all"  # statistics over: all (H, W, C of an example) or channel (last axis)
    epsilon: float = 1e-5  # added to the variance, inside the root
    elementwise: bool = False  # a gain and offset per element instead of per channel
    use_scale: bool = True  # learn a gain
    use_bias: bool = True  # learn an offset
    dtype: DTypeLike | None = None  # of the output; none: the input's
    param_dtype: DTypeLike = "float32"  # of scale and bias
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros

    stateful: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example with nothing unmasked passes with mean 0 and variance 1.
        """
        axes = example_axes(x.ndim, self.axes)
        shape = tuple(x.shape[axis] for axis in axes) if self.elementwise else x.shape[-1:]
        scale, bias = scale_and_bias(self, shape)
        mask = expand_mask(mask, x.ndim)
        x = finite_where_masked(x, mask)
        stats = known_moments(x, axes, mask)
        y = normalize(x, stats.mean, stats.var, self.epsilon, scale, bias)
        return y.astype(output_dtype(self, x))

"""Instance Normalization. Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.

Mean and variance per example and channel over H and W, the same in training and at inference. On a
single position the output is the bias alone. PyTorch's module has no gain and offset by default;
here both are on, as for the other normalizers.
"""

from typing import ClassVar

from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.norms.examples import channel_group_moments
from normlab.norms.functional import expand_mask, finite_where_masked, normalize
from normlab.norms.parameters import Initializer, output_dtype, scale_and_bias


class InstanceNorm(nn.Module):
    """Normalizes each channel of each example over its positions. No state."""

    epsilon: float = 1e-5  # added to the variance, inside the root
    use_scale: bool = True  # learn a gain per channel
    use_bias: bool = True  # learn an offset per channel
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
        scale, bias = scale_and_bias(self, x.shape[-1:])
        mask = expand_mask(mask, x.ndim)
        x = finite_where_masked(x, mask)
        stats = channel_group_moments(x, x.shape[-1], mask)
        y = normalize(x, stats.mean, stats.var, self.epsilon, scale, bias)
        return y.astype(output_dtype(self, x))

"""Filter Response Normalization with TLU. Singh & Krishnan 2019, arXiv:1911.09737.

ν² = mean of x² over the positions of one example and channel, ŷ = γ x/√(ν² + |ε|) + β, and in place
of the activation the thresholded linear unit max(ŷ, τ) with a learned τ per channel. Nothing is
centered and no other example is looked at, so training and inference are the same.

Notes:
* One position (an mlp, a 1×1 map): then x/√(x² + ε) is a step function at ε = 10⁻⁶, with next to no
  gradient. There the paper learns ε; here the denominator gets ε + |ε_l| with one ε_l for the
  layer, 10⁻⁴ at the start (that form and start value are unverified). `learn_epsilon` decides.
* Where a model has no activation (the last normalizer of a residual branch) there is no τ either,
  as in timm with `apply_act=False`. timm's ε is 10⁻⁵.
* The paper warms the learning rate up (unverified for short runs): set `optim.warmup_epochs`.
* On an overflow of x² the output is 0, not NaN: the statistic is reported as not finite.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.examples import position_axes, prepare
from normlab.norms.functional import mean_square, rescale
from normlab.norms.normalizer import (
    Activation,
    AffineNormalizer,
    Facts,
    note_nonfinite,
    output_dtype,
    scale_and_bias,
)

LEARN_EPSILON = ("never", "single", "always")


class FilterResponseNorm(AffineNormalizer):
    """Divides each channel of each example by its root mean square over positions. No state.

    Parameters: `scale`, `bias` [C], with an activation `tau` [C], with a learned ε
    `extra_epsilon` [].
    """

    epsilon: float = 1e-6  # added to the mean square, inside the root
    learn_epsilon: str = "single"  # learn more of it: never, single (maps of one position), always
    activation: Activation | None = nn.relu  # the model's, which it replaces whatever it is

    replaces_activation: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="H W",
        passes=(2, 3),
        equals=(
            "instance_norm without threshold: channels of mean 0",
            "rms_norm without threshold: one channel",
        ),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example with nothing unmasked is normalized by its own values. Raises ValueError for an
        unknown `learn_epsilon`.
        """
        if self.learn_epsilon not in LEARN_EPSILON:
            raise ValueError(
                f"learn_epsilon {self.learn_epsilon!r} is none of {', '.join(LEARN_EPSILON)}"
            )
        scale, bias = scale_and_bias(self, x.shape[-1:])
        x, mask = prepare(x, mask)
        square = mean_square(x, position_axes(x), mask)
        note_nonfinite(self, jnp.isfinite(square).all())
        inverse = jax.lax.rsqrt(square + self._epsilon(x.shape))
        if self.activation is None:
            y = rescale(x, inverse, scale, bias)
        else:
            tau = self.param("tau", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
            y = _thresholded(x, inverse, scale, bias, tau)
        return y.astype(output_dtype(self, x))

    def _epsilon(self, shape: tuple[int, ...]) -> Array | float:
        single = all(length == 1 for length in shape[1:-1])
        if self.learn_epsilon == "never" or (self.learn_epsilon == "single" and not single):
            return self.epsilon
        start = nn.initializers.constant(1e-4)
        return self.epsilon + jnp.abs(self.param("extra_epsilon", start, (), self.param_dtype))


@jax.checkpoint  # the gradient makes ŷ again from x
def _thresholded(
    x: Array, inverse: Array, scale: Array | None, bias: Array | None, tau: Array
) -> Array:
    return jnp.maximum(rescale(x, inverse, scale, bias), tau)

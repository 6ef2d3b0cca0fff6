"""What all normalizers share: the contract, and how `scale`, `bias` and dtypes are declared."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

Initializer = Callable[..., Array]
Activation = Callable[[Array], Array]


class Normalizer(nn.Module):
    """Base of all normalizers, called as `norm(x, train=..., mask=None)`: x [N, ..., C] -> same.

    `mask` [N] or [N, ...] is true where a value counts; a masked value touches no statistic. State
    lives in the collection `batch_stats` and nowhere else. A stateful one has
    `state_from_moments(moments)`, the state that stands for population moments [C], or [..., C].
    """

    stateful: ClassVar[bool] = False
    replaces_activation: ClassVar[bool] = False
    """True if the class has a field `activation`: that of the model, which it takes over, or None
    where the model has none. Only `NormFactory` sets it."""

    def note(self, channels: int) -> str:
        """Returns where it departs from its fields for this many channels; "" if nowhere."""
        return ""


def scale_and_bias(module: nn.Module, shape: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """Declares the parameters `scale` and `bias` of a module that has the common fields.

    Returns None for one that the module does without. Call it inside a compact method.
    """
    scale = bias = None
    if module.use_scale:
        scale = module.param("scale", module.scale_init, shape, module.param_dtype)
    if module.use_bias:
        bias = module.param("bias", module.bias_init, shape, module.param_dtype)
    return scale, bias


def note_nonfinite(module: nn.Module, finite: Array) -> None:
    """Leaves in the collection `nonfinite` that a statistic is not finite, if asked for.

    The output may well be finite where a statistic is not, as x/∞ is. `finite`: boolean [].
    """
    if module.is_mutable_collection("nonfinite") and not module.is_initializing():
        # One bad statistic of several is enough.
        start = partial(jnp.zeros, (), bool)
        module.sow("nonfinite", "statistics", ~finite, init_fn=start, reduce_fn=jnp.logical_or)


def output_dtype(module: nn.Module, x: Array) -> DTypeLike:
    """Returns the module's `dtype`, or the input's where none is set."""
    return x.dtype if module.dtype is None else module.dtype

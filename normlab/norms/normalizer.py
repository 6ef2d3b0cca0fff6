"""What all normalizers share: the contract, and how `scale`, `bias` and dtypes are declared."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

Initializer = Callable[..., Array]
Activation = Callable[[Array], Array]


class Facts(NamedTuple):
    """What a table of all normalizers says of one (`catalogue.py`)."""

    over: str = ""  # axes of x [N, H, W, C] that share a statistic in training; C/G: in groups
    at_inference: str = "the same"  # what stands in for these statistics
    passes: tuple[int, int] | None = None
    """Least reads and writes of a tensor, forward and backward, where groups of an example fit in a
    cache and a batch does not: over the batch 3 (read; read and write) and 5 (read x and dy; read
    both and write dx), else 2 and 3. None: no tensor is moved, or by a rule of its own."""
    equals: tuple[str, ...] = ()  # limiting cases: another normalizer, and when it is that


class LayerBefore(NamedTuple):
    """The linear layer that a normalizer's input comes from, as a function of its kernel."""

    kernel: Array  # [..., C]
    output: Callable[[Array], Array]  # kernel -> x [N, ..., C], the normalizer's input


class Normalizer(nn.Module):
    """Base of all normalizers, called as `norm(x, train=..., mask=None)`: x [N, ..., C] -> same.

    `mask` [N] or [N, ...] is true where a value counts; a masked value touches no statistic. State
    lives in the collection `batch_stats` and nowhere else. A stateful one has
    `state_from_moments(moments)`, the state that stands for population moments [C], or [..., C].
    """

    stateful: ClassVar[bool] = False
    facts: ClassVar[Facts] = Facts()
    averages_groups: ClassVar[bool] = False
    """True if a batch's new state is the mean of what each of its groups would make of the old."""
    replaces_activation: ClassVar[bool] = False
    """True if the class has a field `activation`: that of the model, which it takes over, or None
    where the model has none. Only `NormFactory` sets it."""
    needs_layer: ClassVar[bool] = False
    """True if `__call__` takes `layer`, the linear layer before it, where there is one."""
    replaces_bias: ClassVar[bool] = True
    """True if its offset stands in for that of the linear layer before it."""
    measures: ClassVar[tuple[str, ...]] = ()
    """What it leaves in the collection `measures` at each training step: see `measure`."""
    fractions: ClassVar[Mapping[str, float]] = {}
    """Durations among its fields that start, in a config, as a part of the run: {"warmup": 0.1} for
    `warmup_steps`. Those of a paper's long run would never end in a short one."""

    def note(self, channels: int) -> str:
        """Returns where it departs from its fields for this many channels; "" if nowhere."""
        return ""


class AffineNormalizer(Normalizer):
    """Base of all but the identity: the common fields."""

    use_scale: bool = True  # learn a gain per channel
    use_bias: bool = True  # learn an offset per channel
    dtype: DTypeLike | None = None  # of the output; none: the input's
    param_dtype: DTypeLike = "float32"  # of the parameters
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros


def scale_and_bias(
    module: AffineNormalizer, shape: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """Declares the parameters `scale` and `bias`.

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


def measure(module: nn.Module, **values: Array) -> None:
    """Leaves numbers [] about a training step in the collection `measures`, if asked for.

    Their means over steps are in the run's log. Their names are the class's `measures`.
    """
    if module.is_mutable_collection("measures") and not module.is_initializing():
        for name, value in values.items():
            module.sow("measures", name, value, reduce_fn=lambda _, new: new)


def output_dtype(module: AffineNormalizer, x: Array) -> DTypeLike:
    """Returns the module's `dtype`, or the input's where none is set."""
    return x.dtype if module.dtype is None else module.dtype

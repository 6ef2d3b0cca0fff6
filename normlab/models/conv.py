"""Convolutions and dense layers, injected into models as `config.conv`.

On a CPU the filter gradient is summed over pieces of the batch that fit the cache. XLA's own form,
a convolution whose kernel is as large as the image, falls out of it: a training step of ResNet-20
with batch 128 on two x86 cores takes 1.5 times as long, and 1.1 times with all taps as one matrix
product (jaxlib 0.10.2).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jax.typing import DTypeLike

from normlab.errors import unknown
from normlab.norms import LayerBefore, NormAct, Normalizer
from normlab.norms.normalizer import Initializer

FILTER_GRADIENTS = ("auto", "whole", "split")
BOUNDARIES = ("zeros", "circular")

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""He et al. 2015 (arXiv:1502.01852, eq. 10): N(0, 2 / fan-in), not truncated."""

lecun_normal = nn.initializers.lecun_normal()
"""N(0, 1 / fan-in), truncated at two deviations."""

Padding = int | Literal["SAME"] | None
"""Of a convolution: pixels on each side; None: (kernel size − 1) / 2; SAME: XLA's."""


def sides(kernel_size: int, padding: Padding) -> Any:
    """Returns the padding of a square convolution as `lax.conv_general_dilated` takes it."""
    if padding == "SAME":
        return padding
    side = (kernel_size - 1) // 2 if padding is None else padding
    return ((side, side), (side, side))


@dataclasses.dataclass(frozen=True)
class StandardConv:
    """Plain convolutions and dense layers, He-initialized, without reparametrization."""

    filter_gradient: str = "auto"  # over the batch: whole, split, or auto (split on a single CPU)
    boundary: str = "zeros"  # what stands beyond an image: zeros, or circular: its other side

    def conv(
        self,
        features: int,
        kernel_size: int,
        *,
        name: str,
        strides: int = 1,
        padding: Padding = None,
        groups: int = 1,
        use_bias: bool = False,
        dtype: DTypeLike = "float32",
        kernel_init: Initializer | None = None,
    ) -> nn.Module:
        """Returns a square 2-D convolution: [N, H, W, C] -> [N, H', W', features].

        `padding` in pixels on each side; None: (kernel_size − 1) / 2, as PyTorch and Caffe nets
        have it; "SAME": XLA's, which with a stride pads elsewhere and is another network. With
        `groups`, each of as many parts of the outputs sees its own part of the inputs; the
        kernel is [kernel_size, kernel_size, C / groups, features]. `kernel_init`: where a model
        asks for weights other than this kind's.
        """
        return nn.Conv(
            features,
            (kernel_size, kernel_size),
            strides=strides,
            padding=sides(kernel_size, padding),
            feature_group_count=groups,
            use_bias=use_bias,
            dtype=dtype,
            kernel_init=kernel_init or he_normal,
            conv_general_dilated=self.convolution(),
            name=name,
        )

    def dense(
        self,
        features: int,
        *,
        name: str,
        use_bias: bool = True,
        dtype: DTypeLike = "float32",
        kernel_init: Initializer = lecun_normal,
    ) -> nn.Module:
        """Returns a dense layer over the last axis, with LeCun's N(0, 1 / fan-in) weights."""
        return nn.Dense(
            features, use_bias=use_bias, dtype=dtype, kernel_init=kernel_init, name=name
        )

    def head(
        self,
        features: int,
        *,
        name: str,
        dtype: DTypeLike = "float32",
        kernel_init: Initializer = lecun_normal,
    ) -> nn.Module:
        """Returns a model's last layer: plain, whatever the hidden ones are.

        No normalizer follows it, so standardized weights would multiply the logits.
        """
        return StandardConv.dense(self, features, name=name, dtype=dtype, kernel_init=kernel_init)

    @property
    def starts_from_data(self) -> bool:
        """True if parameters are set from the first batch (`training/start.py`)."""
        return False

    def convolution(self) -> Any:
        """Returns `lax.conv_general_dilated`, or what these fields make of it.

        Raises UserError for a word that is none.
        """
        if self.boundary not in BOUNDARIES:
            raise unknown("'conv.boundary'", self.boundary, BOUNDARIES)
        convolution = self._with_filter_gradient()
        return partial(conv_on_torus, convolution) if self.boundary == "circular" else convolution

    def _with_filter_gradient(self) -> Any:
        if self.filter_gradient not in FILTER_GRADIENTS:
            raise unknown("'conv.filter_gradient'", self.filter_gradient, FILTER_GRADIENTS)
        # A batch laid over several devices would have to be gathered to be split.
        single_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        if self.filter_gradient == "split" or (self.filter_gradient == "auto" and single_cpu):
            return conv_with_split_gradient
        return lax.conv_general_dilated


def linear_norm(
    layer: nn.Module,
    norm: Normalizer | NormAct,
    x: Array,
    *,
    train: bool,
    mask: Array | None = None,
) -> Array:
    """Returns norm(layer(x)): x [N, ..., C] -> [N, ..., features].

    A normalizer that needs the layer before it is handed it, as a function of its kernel.
    """
    if not norm.needs_layer:
        return norm(layer(x), train=train, mask=mask)
    if mask is not None and mask.ndim == 1:
        x = jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, 0)  # padding may hold anything
    y = layer(x)
    x, params = lax.stop_gradient((x, layer.variables["params"]))
    alone = layer.clone(parent=None)

    def output(kernel: Array) -> Array:
        return cast(Array, alone.apply({"params": {**params, "kernel": kernel}}, x))

    return norm(y, train=train, mask=mask, layer=LayerBefore(params["kernel"], output))


def conv_on_torus(
    convolution: Callable[..., Array],
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Any,
    **other: Any,
) -> Array:
    """Returns the convolution of images [N, H, W, C] that go on at their other side.

    No position is at a border, so a random layer's variances are those of theory, where padding by
    zeros takes some off. `padding`: as of `lax.conv_general_dilated`.
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding)
    x = jnp.pad(x, ((0, 0), *map(tuple, padding), (0, 0)), mode="wrap")
    return convolution(x, kernel, strides, "VALID", **other)


_PIECE_BYTES, _MAX_PIECES = 256 * 1024, 16


def conv_with_split_gradient(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **other: Any
) -> Array:
    """`lax.conv_general_dilated` whose filter gradient is summed over pieces of the batch.

    The output and the input's gradient are XLA's own, and so are the sum's terms: one for each of
    up to 16 pieces of at least 256 KiB of x [N, ...].
    """

    def conv(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **other)

    split = jax.custom_jvp(conv)

    @split.defjvp
    def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
        # Seen backwards, this is the sum of the pieces: in float32, whatever they are computed in.
        wide = kernel_tangent.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        pieces = jnp.split(x, num_pieces(x))
        by_kernel = [conv(piece, wide.astype(kernel.dtype)) for piece in pieces]
        return conv(x, kernel), conv(x_tangent, kernel) + jnp.concatenate(by_kernel)

    return split(x, kernel)


def num_pieces(x: Array) -> int:
    """Returns into how many pieces a batch [N, ...] is split: a power of two that divides N."""
    pieces, limit = 1, min(_MAX_PIECES, x.size * x.dtype.itemsize // _PIECE_BYTES)
    while 2 * pieces <= limit and x.shape[0] % (2 * pieces) == 0:
        pieces *= 2
    return pieces

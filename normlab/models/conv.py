"""Convolutions and dense layers, injected into models as `config.conv`.

On CPU the filter gradient of small convolutions is computed as one matrix product. XLA's own form
(a convolution whose kernel is as large as the image) is three to five times slower there at the
sizes of CIFAR nets: 29.8 against 10.3 ms at 128×32×32×16 on two x86 cores.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jax.typing import DTypeLike

from normlab.errors import unknown

FILTER_GRADIENTS = ("auto", "xla", "matmul")

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""He et al. 2015 (arXiv:1502.01852, eq. 10): N(0, 2 / fan-in), not truncated."""


@dataclasses.dataclass(frozen=True)
class StandardConv:
    """Plain convolutions and dense layers, He-initialized, without reparametrization."""

    filter_gradient: str = "auto"  # of a convolution: xla, matmul, or auto (matmul on CPU)

    def conv(
        self,
        features: int,
        kernel_size: int,
        *,
        name: str,
        strides: int = 1,
        padding: int | None = None,
        use_bias: bool = False,
        dtype: DTypeLike = "float32",
    ) -> nn.Module:
        """Returns a square 2-D convolution: [N, H, W, C] -> [N, H', W', features].

        `padding` in pixels on each side; None: (kernel_size − 1) / 2, as PyTorch and Caffe nets
        have it (with a stride, XLA's SAME pads elsewhere and is another network).
        """
        side = (kernel_size - 1) // 2 if padding is None else padding
        return nn.Conv(
            features,
            (kernel_size, kernel_size),
            strides=strides,
            padding=((side, side), (side, side)),
            use_bias=use_bias,
            dtype=dtype,
            kernel_init=he_normal,
            conv_general_dilated=self._function(),
            name=name,
        )

    def dense(
        self, features: int, *, name: str, use_bias: bool = True, dtype: DTypeLike = "float32"
    ) -> nn.Module:
        """Returns a dense layer over the last axis, with LeCun's N(0, 1 / fan-in) weights."""
        return nn.Dense(features, use_bias=use_bias, dtype=dtype, name=name)

    def _function(self) -> Any:
        if self.filter_gradient not in FILTER_GRADIENTS:
            raise unknown("'conv.filter_gradient'", self.filter_gradient, FILTER_GRADIENTS)
        on_cpu = jax.default_backend() == "cpu"
        if self.filter_gradient == "matmul" or (self.filter_gradient == "auto" and on_cpu):
            return conv_with_matmul_gradient
        return lax.conv_general_dilated


CONVS: dict[str, type] = {"standard": StandardConv}
"""Convolution kinds by config name."""

Window = tuple[tuple[int, int], tuple[tuple[int, int], tuple[int, int]]]  # strides, padding


def conv_with_matmul_gradient(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Any,
    *,
    dimension_numbers: Any = None,
    precision: Any = None,
    **other: Any,
) -> Array:
    """`lax.conv_general_dilated` for NHWC × HWIO whose filter gradient is a matrix product.

    Only kernels up to 3×3, undilated and ungrouped; anything else is XLA's own. As every custom
    gradient it has no forward-mode derivative.
    """
    plain = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}
    fits = (
        x.ndim == 4
        and max(kernel.shape[:2]) <= 3
        and not isinstance(padding, str)
        and all(value in (None, 1, plain.get(name)) for name, value in other.items())
    )
    if not fits:
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=dimension_numbers,
            precision=precision,
            **other,
        )
    (top, bottom), (left, right) = padding
    window = ((strides[0], strides[1]), ((top, bottom), (left, right)))
    return _conv(x, kernel, window)


def _plain_conv(x: Array, kernel: Array, window: Window) -> Array:
    return lax.conv_general_dilated(x, kernel, *window, dimension_numbers=("NHWC", "HWIO", "NHWC"))


_conv = jax.custom_vjp(_plain_conv, nondiff_argnums=(2,))


def _conv_forward(x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return _plain_conv(x, kernel, window), (x, kernel)


def _conv_backward(window: Window, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    _, input_gradient = jax.vjp(lambda x: _plain_conv(x, kernel, window), x)
    return *input_gradient(g), filter_gradient(x, g, kernel.shape, window).astype(kernel.dtype)


_conv.defvjp(_conv_forward, _conv_backward)


def filter_gradient(x: Array, g: Array, kernel_shape: Sequence[int], window: Window) -> Array:
    """Returns ∂L/∂kernel: x [N, H, W, I], g = ∂L/∂y [N, H', W', O] -> [KH, KW, I, O].

    ∂L/∂k[a, b] = Σ_{n,h,w} x[n, sh + a − p, sw + b − p] g[n, h, w]. The taps b are x's columns,
    shifted and side by side on channels. At stride 1 the taps a are g's rows shifted the other way,
    so that one product [KW·I, NHW'] × [NHW', KH·O] has them all; with a stride they stand beside
    the taps b.
    """
    rows, columns, inputs, outputs = kernel_shape
    (stride_h, stride_w), ((top, _), (left, _)) = window
    height, (out_height, out_width) = x.shape[1], g.shape[1:3]

    def taps(x: Array, axis: int, count: int, stride: int, low: int, out: int) -> Array:
        """Lays x's values at taps 0 .. count−1 of the window along `axis` side by side."""
        shifted = []
        for tap in range(count):
            pads = [(0, 0, 0)] * 4
            reach = (out - 1) * stride + 1
            pads[axis] = (low - tap, reach - x.shape[axis] - low + tap, 0)
            moved = lax.pad(x, jnp.zeros((), x.dtype), pads)
            shifted.append(lax.slice_in_dim(moved, 0, None, stride, axis))
        return shifted[0] if count == 1 else jnp.concatenate(shifted, axis=-1)

    x = taps(x, 2, columns, stride_w, left, out_width)
    if stride_h == 1:
        moved = [
            lax.pad(
                g,
                jnp.zeros((), g.dtype),
                [(0, 0, 0), (a - top, height - out_height - a + top, 0), (0, 0, 0), (0, 0, 0)],
            )
            for a in range(rows)
        ]
        g = moved[0] if rows == 1 else jnp.concatenate(moved, axis=-1)
        product = _over_positions(x, g).reshape(columns, inputs, rows, outputs)
        return product.transpose(2, 0, 1, 3)
    x = taps(x, 1, rows, stride_h, top, out_height)
    return _over_positions(x, g).reshape(rows, columns, inputs, outputs)


def _over_positions(x: Array, g: Array) -> Array:
    """Returns Σ over examples and positions of x ⊗ g: [N, H, W, A], [N, H, W, B] -> [A, B].

    The barrier keeps XLA from computing the shifted copies again inside the product.
    """
    x, g = lax.optimization_barrier((x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])))
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=accumulate)

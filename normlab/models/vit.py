"""Vision transformer of tiny size. Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; width,
depth and heads are those of DeiT-Ti (Touvron et al. 2021, arXiv:2012.12877, table 1).

Pre-norm, as both have it: x ← x + f(norm(x)), and a last norm before the head. Post-norm, as the
first transformer (Vaswani et al. 2017, arXiv:1706.03762, section 3.1): x ← norm(x + f(x)), and none
before the head.

Departures: weights are drawn as in the other models (LeCun's normal; the patches' as those of a
convolution) and not from a truncated normal of 0.02; no dropout; the MLP's GELU is the tanh form.
All linear layers have a bias, since none of them stands before a normalizer.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax import Array
from jax.typing import DTypeLike

from normlab.errors import UserError, unknown
from normlab.models.conv import StandardConv
from normlab.models.remat import call_block
from normlab.models.signals import sow_signals
from normlab.norms import NormFactory

POOLINGS = ("class_token", "mean")
NORM_POSITIONS = ("pre", "post")

embedding_init = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens; the softmax is taken in float32 at least."""

    num_heads: int
    conv: StandardConv
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [N, T, C] -> [N, T, C]."""
        *lead, channels = x.shape
        qkv = self.conv.dense(3 * channels, dtype=self.dtype, name="qkv")(x)
        heads = qkv.reshape(*lead, 3, self.num_heads, channels // self.num_heads)
        q, k, v = jnp.moveaxis(heads, -3, 0)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        scores = jnp.einsum("nqhc,nkhc->nhqk", q, k, preferred_element_type=wide)
        weights = jax.nn.softmax(scores / q.shape[-1] ** 0.5, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("nhqk,nkhc->nqhc", weights, v).reshape(*lead, channels)
        return self.conv.dense(channels, dtype=self.dtype, name="out")(mixed)


class Block(nn.Module):
    """Attention and an MLP, each with its residual and its normalizer."""

    num_heads: int
    mlp_ratio: int
    norm_position: str
    norm: NormFactory
    conv: StandardConv
    activation: Callable[[Array], Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, T, C], mask [N] -> [N, T, C]."""

        def mlp(x: Array) -> Array:
            channels = x.shape[-1]
            x = self.conv.dense(self.mlp_ratio * channels, dtype=self.dtype, name="mlp1")(x)
            return self.conv.dense(channels, dtype=self.dtype, name="mlp2")(self.activation(x))

        attention = Attention(self.num_heads, self.conv, self.dtype, name="attention")
        branches: tuple[Callable[[Array], Array], ...] = (attention, mlp)
        for i, branch in enumerate(branches, 1):
            norm = self.norm(name=f"norm{i}")
            if self.norm_position == "pre":
                y = branch(norm(x, train=train, mask=mask)).astype(x.dtype)
                x = x + y
            else:
                y = branch(x).astype(x.dtype)
                x = norm(x + y, train=train, mask=mask)
            sow_signals(self, branch=y, stream=x)
        return x


class ViTTiny(nn.Module):
    """Vision transformer of 12 blocks, width 192: 5,362,762 parameters on CIFAR-10's images."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    patch_size: int = 4  # side of a patch, pixels; it must divide the image's
    width: int = 192  # channels of a token
    depth: int = 12  # blocks
    num_heads: int = 3  # of attention; they divide the width
    mlp_ratio: int = 4  # hidden units of an MLP, over the width
    norm_position: str = "pre"  # pre: norm before a branch; post: norm after the residual sum
    pooling: str = "class_token"  # what the head sees: class_token, or the mean over all tokens
    position_embedding: bool = True  # learn a vector a position; else tokens have no order
    activation: Callable[[Array], Array] = nn.gelu  # of the MLPs
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32
    remat: bool = False  # keep the inputs of blocks alone, in training

    norm_defaults: ClassVar[FrozenDict[str, Any]] = FrozenDict(axes="channel")
    """Over `all` a token would be normalized by the values of the others."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], mask [N] -> logits float32 [N, num_classes]."""
        self._check(x.shape)
        patch = self.conv.conv(
            self.width,
            self.patch_size,
            strides=self.patch_size,
            padding=0,
            use_bias=True,
            dtype=self.dtype,
            name="patch",
        )
        x = patch(x.astype(self.dtype)).reshape(x.shape[0], -1, self.width)
        if self.pooling == "class_token":
            token = self.param("class_token", embedding_init, (1, 1, self.width))
            token = jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(x.dtype)
            x = jnp.concatenate([token, x], axis=1)
        if self.position_embedding:
            positions = self.param("positions", embedding_init, (1, *x.shape[1:]))
            x = x + positions.astype(x.dtype)
        for i in range(1, self.depth + 1):
            block = Block(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                norm_position=self.norm_position,
                norm=self.norm,
                conv=self.conv,
                activation=self.activation,
                dtype=self.dtype,
                name=f"block{i}",
            )
            x = call_block(block, x, train=train, mask=mask, remat=self.remat)
        if self.norm_position == "pre":
            x = self.norm(name="norm_final")(x, train=train, mask=mask)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x[:, 0] if self.pooling == "class_token" else x.mean(1)
        return self.conv.head(self.num_classes, name="head")(x)

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.pooling not in POOLINGS:
            raise unknown("'model.pooling'", self.pooling, POOLINGS)
        if self.norm_position not in NORM_POSITIONS:
            raise unknown("'model.norm_position'", self.norm_position, NORM_POSITIONS)
        _, height, width, _ = shape
        _check_divides("patch_size", self.patch_size, f"images of {height}×{width}", height, width)
        _check_divides("num_heads", self.num_heads, f"a width of {self.width}", self.width)


def _check_divides(field: str, value: int, what: str, *sizes: int) -> None:
    """Raises UserError, with the nearest right value, unless `value` divides all sizes."""
    legal = [n for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes)]
    if value not in legal:
        nearest = min(legal, key=lambda n: abs(n - value))
        raise UserError(
            f"config field 'model.{field}' = {value} does not divide {what}; nearest: {nearest}"
        )

"""Group Normalization. Wu & He 2018, arXiv:1803.08494.

Mean and variance per example over H, W and the C/G channels of a group (eq. 7), the same in
training and at inference; a gain and offset per channel. G = 1 is layer normalization over H, W and
C, G = C instance normalization. ε is the paper's code's 1e-5; Flax has 1e-6.
"""

from typing import ClassVar

from flax import linen as nn
from jax import Array

from normlab.norms.examples import normalize_groups, prepare
from normlab.norms.normalizer import (
    AffineNormalizer,
    Facts,
    output_dtype,
    scale_and_bias,
)


class GroupNorm(AffineNormalizer):
    """Normalizes each example over groups of channels. No state."""

    num_groups: int = 32  # groups of channels; ignored if group_size is set
    group_size: int | None = None  # channels in a group, in place of num_groups
    epsilon: float = 1e-5  # added to the variance, inside the root
    strict: bool = True  # refuse a grouping that does not divide the channels, or settle it

    facts: ClassVar[Facts] = Facts(
        over="H W C/G",
        passes=(2, 3),
        equals=(
            "layer_norm: num_groups 1",
            "instance_norm: num_groups C",
        ),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example with nothing unmasked is normalized by its own values. Raises ValueError if the
        groups do not divide the channels and `strict` is set.
        """
        groups = self.groups_of(x.shape[-1])
        scale, bias = scale_and_bias(self, x.shape[-1:])
        x, mask = prepare(x, mask)
        y = normalize_groups(self, x, groups, mask, scale, bias)
        return y.astype(output_dtype(self, x))

    def groups_of(self, channels: int) -> int:
        """Returns the number of groups for this many channels (see `divide_channels`)."""
        return divide_channels(channels, self.num_groups, self.group_size, strict=self.strict)

    def note(self, channels: int) -> str:
        """Returns that the groups are settled otherwise than wished; "" if they are not."""
        return settled_groups(channels, self.num_groups, self.group_size)


def divide_channels(
    channels: int, num_groups: int, group_size: int | None = None, *, strict: bool = True
) -> int:
    """Returns the number of groups of `channels`: num_groups, or as many as group_size makes.

    Where the wish does not divide them: ValueError if `strict`, else the largest number of groups
    that divides and does not exceed it.
    """
    if group_size is None:
        return divisor(channels, num_groups, "num_groups", strict=strict)
    if group_size >= 1 and channels % group_size == 0:
        return channels // group_size
    if strict:
        raise ValueError(f"group_size {group_size} does not divide {channels} channels")
    return largest_divisor(channels, channels // max(group_size, 1))


def settled_groups(channels: int, num_groups: int, group_size: int | None = None) -> str:
    """Returns the line that says how `divide_channels` settled; "" where it is as wished."""
    groups = divide_channels(channels, num_groups, group_size, strict=False)
    if group_size is None:
        return settled("num_groups", num_groups, groups, channels, f"{groups} groups")
    return settled("group_size", group_size, channels // groups, channels, f"{groups} groups")


def settled(field: str, wish: int, found: int, channels: int, result: str) -> str:
    """Returns the line that says how a grouping was settled; "" where it is as wished."""
    if found == wish:
        return ""
    return f"{field} {wish} does not divide {channels} channels: {result}"


def divisor(channels: int, wish: int, field: str, *, strict: bool) -> int:
    """Returns `wish` where it divides the channels, else ValueError if `strict`, else the largest
    divisor that does not exceed it.
    """
    if wish >= 1 and channels % wish == 0:
        return wish
    if strict:
        raise ValueError(f"{field} {wish} does not divide {channels} channels")
    return largest_divisor(channels, wish)


def largest_divisor(channels: int, limit: int) -> int:
    """Returns the largest divisor of `channels` that is at most `limit`, and at least 1."""
    return next(d for d in range(max(1, min(limit, channels)), 0, -1) if channels % d == 0)

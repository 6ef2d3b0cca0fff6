"""Less memory for more computation: a residual block keeps its input alone for the backward pass.

Chen et al. 2016 (arXiv:1604.06174). What the block computes is computed again when its gradient is
taken, from the same numbers in the same order, so nothing changes but memory and time.
"""

from typing import Any

from flax import linen as nn
from jax import Array


def call_block(
    block: nn.Module, x: Array, *, train: bool, mask: Array | None, remat: bool
) -> Array:
    """Returns block(x, train=..., mask=...), rematerialized in the backward pass if `remat`."""
    if not (remat and train):
        return block(x, train=train, mask=mask)

    def call(block: Any, x: Array, mask: Array | None) -> Array:
        return block(x, train=train, mask=mask)

    return nn.remat(call)(block, x, mask)

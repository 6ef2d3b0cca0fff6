"""What residual blocks show to whoever measures how signals spread with depth.

Each block sows, under its own path, the end of its residual branch and its output; the analysis
asks for the collection and takes moments of what it finds. Where nobody asks, nothing is kept, and
what is not used is not computed.
"""

from flax import linen as nn
from jax import Array

SIGNALS = "signals"
"""The collection: `branch` and `stream` of each residual block, each a tuple of one array."""


def sow_signals(module: nn.Module, *, branch: Array, stream: Array) -> None:
    """Sows both of a block, [N, H, W, C] each, where the collection is mutable.

    `branch` is the end of the residual branch before stochastic depth, skip gain (Fixup's
    multiplier and last bias) and α; `stream` is the block's output. At `init`, where every
    collection is mutable, it sows nothing.
    """
    if not module.is_initializing():
        module.sow(SIGNALS, "branch", branch)
        module.sow(SIGNALS, "stream", stream)

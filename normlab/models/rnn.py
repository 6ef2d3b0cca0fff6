"""A recurrent classifier of images, read as sequences: row by row, or pixel by pixel.

Pixel by pixel, with one cell of 100 units, it is the network of sequential MNIST in Cooijmans et
al. 2016 (arXiv:1603.09025, section 5.1), and with a fixed permutation that of permuted MNIST.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.errors import unknown
from normlab.models.conv import StandardConv
from normlab.models.recurrent import CELLS, PLACES, STATISTICS, Recurrence
from normlab.norms import NormFactory

STEPS = ("rows", "pixels")


class RNN(nn.Module):
    """Recurrent layers over an image's rows or pixels; linear head on the last hidden state."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    cell: str = "lstm"  # lstm or simple (tanh)
    widths: tuple[int, ...] = (100,)  # hidden units of each layer
    normalized: tuple[str, ...] = PLACES  # input (W_x x), hidden (W_h h), cell (c, of an lstm)
    statistics: str = "per_step"  # at inference: per_step, or shared (the mean over all steps)
    initial_scale: float = 0.1  # of the normalizers' gains at the start; Ba et al. (2016) have 1
    forget_bias: float = 1.0  # of the forget gates at the start
    steps: str = "rows"  # what a step takes in: rows or pixels
    permutation_seed: int | None = None  # of a fixed random order of the pixels; none: as they are
    activation: Callable[[Array], Array] = nn.tanh  # of the candidate, the cell and the simple cell
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], mask [N] or [N, T] -> logits float32 [N, num_classes].

        With a mask [N, T] the logits are those of the state after the last step that counts.
        """
        self._check()
        x = sequence(x.astype(self.dtype), self.steps, self.permutation_seed)
        for i, width in enumerate(self.widths, 1):
            make_cell = functools.partial(
                CELLS[self.cell],
                features=width,
                norm=self.norm,
                conv=self.conv,
                normalized=self.normalized,
                initial_scale=self.initial_scale,
                forget_bias=self.forget_bias,
                activation=self.activation,
                dtype=self.dtype,
            )
            layer = Recurrence(make_cell, self.conv, self.statistics, name=f"layer{i}")
            x = layer(x, train=train, mask=mask)
        last = x[:, -1].astype(jnp.promote_types(self.dtype, jnp.float32))
        return self.conv.head(self.num_classes, name="head")(last)

    def _check(self) -> None:
        fields = {"cell": CELLS, "statistics": STATISTICS, "steps": STEPS}
        for name, allowed in fields.items():
            if getattr(self, name) not in allowed:
                raise unknown(f"'model.{name}'", getattr(self, name), allowed)
        for place in self.normalized:
            if place not in PLACES:
                raise unknown("place in 'model.normalized'", place, PLACES)


def sequence(x: Array, steps: str, permutation_seed: int | None = None) -> Array:
    """Returns images [N, H, W, C] as sequences: rows [N, H, W·C] or pixels [N, H·W, C].

    The permutation is of pixels, before they are cut into rows.
    """
    num_examples, height, width, channels = x.shape
    x = x.reshape(num_examples, height * width, channels)
    if permutation_seed is not None:
        x = x[:, np.random.default_rng(permutation_seed).permutation(height * width)]
    return x if steps == "pixels" else x.reshape(num_examples, height, width * channels)

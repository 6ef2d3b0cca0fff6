"""Recurrent cells with normalizers, and a layer that takes them over time.

The LSTM of Cooijmans et al. 2016 (arXiv:1603.09025, equations 6 to 8), N any normalizer:

    (f, i, o, g) = N_hidden(W_h h) + N_input(W_x x) + b
    c ← σ(f)·c + σ(i)·tanh(g)
    h ← σ(o)·tanh(N_cell(c))

With batch normalization it is their BN-LSTM, with layer normalization the LN-LSTM of Ba et al. 2016
(arXiv:1607.06450, equations 20 to 22), whose statistics are over all gates together, as here. With
N_input alone it is the rule of Laurent et al. 2015 (arXiv:1510.01378), frame by frame. The simple
cell is h ← tanh(N_hidden(W_h h) + N_input(W_x x) + b).

Notes:
* Bias is in one place: N_hidden and N_input have none of their own, and b [gates·features] takes
  it. Ba et al. have all three, which is the same function with redundant parameters.
* Ba et al. normalize the sum of both parts in the simple cell (equation 4), here each part.
* Gains start at 0.1 (`initial_scale`): with unit variance before each tanh the gradient vanishes
  over time (Cooijmans et al., section 4). Ba et al. start at 1.
* Statistics are those of a time step: no two steps share a running average, since the first ones
  differ from the later. The state has time as its first axis. Sequences longer than those of the
  training use the last step's (Cooijmans et al., section 3).
* A normalizer that takes the activation's place does so where tanh follows it, at N_cell; at the
  gates it comes without an activation.
* Weight norm's data-dependent start leaves what is inside the recurrence as it is drawn: recursion
  has no such start (Salimans & Kingma 2016, section 3).
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.models.conv import StandardConv
from normlab.norms import NormFactory
from normlab.norms.functional import expand_mask, finite_where_masked

PLACES = ("input", "hidden", "cell")
"""Where a cell may normalize; a simple cell has no `cell`."""

STATISTICS = ("per_step", "shared")

TIME_AXES: dict[Any, Any] = {
    "batch_stats": 0,
    "batch_moments": 0,
    "nonfinite": 0,
    "measures": 0,
    "intermediates": 1,  # examples first, as outside
}
"""Where each collection has the time axis."""

Carry = tuple[Array, ...]  # the hidden state [N, features] first


class Cell(nn.Module):
    """Base of the cells: one step, called as `cell(carry, x, train=..., mask=None)` -> carry."""

    features: int
    norm: NormFactory
    conv: StandardConv
    normalized: tuple[str, ...] = PLACES
    initial_scale: float = 0.1
    forget_bias: float = 1.0
    activation: Callable[[Array], Array] = nn.tanh
    dtype: DTypeLike = "float32"

    gates: ClassVar[int] = 1

    @property
    def size(self) -> int:
        """Numbers that a step takes in and sums, for all gates."""
        return self.gates * self.features

    def start(self, num_examples: int) -> Carry:
        """Returns the state before the first step: zeros [N, features]."""
        return (jnp.zeros((num_examples, self.features), self.dtype),)

    def summed(self, h: Array, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Returns N_hidden(W_h h) + N_input(x) + b, [N, size]; x is W_x x already."""

        def normalize(place: str, values: Array) -> Array:
            if place not in self.normalized:
                return values
            norm = self.norm(name=f"norm_{place}", scale_init=self.scale_init, use_bias=False)
            return norm(values, train=train, mask=mask)

        hidden = self.conv.dense(
            self.size,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=functools.partial(orthogonal_gates, self.gates),
            name="hidden",
        )
        bias = self.param("bias", self.bias_init, (self.size,))
        return normalize("hidden", hidden(h)) + normalize("input", x) + bias.astype(x.dtype)

    @property
    def scale_init(self) -> Callable[..., Array]:
        """The initializer of the normalizers' gains."""
        return nn.initializers.constant(self.initial_scale)

    def bias_init(self, key: Array, shape: tuple[int, ...], dtype: Any = "float32") -> Array:
        """Returns b at the start."""
        return jnp.zeros(shape, dtype)


class SimpleCell(Cell):
    """h ← tanh(N_hidden(W_h h) + N_input(W_x x) + b)."""

    @nn.compact
    def __call__(self, carry: Carry, x: Array, *, train: bool, mask: Array | None = None) -> Carry:
        """carry ([N, features],), x [N, features] = W_x x, mask [N] -> carry."""
        [h] = carry
        h = self.activation(self.summed(h, x, train=train, mask=mask))
        return (h.astype(self.dtype),)


class LSTMCell(Cell):
    """The LSTM above: the forget gate's bias starts at `forget_bias`.

    c is a sum over time, so it is float32 at least.
    """

    gates: ClassVar[int] = 4

    @nn.compact
    def __call__(self, carry: Carry, x: Array, *, train: bool, mask: Array | None = None) -> Carry:
        """carry (h, c), both [N, features], x [N, 4·features] = W_x x, mask [N] -> carry."""
        h, c = carry
        z = self.summed(h, x, train=train, mask=mask)
        f, i, o, g = jnp.split(z, self.gates, axis=-1)
        new_c = nn.sigmoid(f) * c + nn.sigmoid(i) * self.activation(g)
        new_c = new_c.astype(c.dtype)
        if "cell" in self.normalized:
            act = self.norm.norm_act(
                name="norm_cell", activation=self.activation, scale_init=self.scale_init
            )
            shown = act(new_c, train=train, mask=mask)
        else:
            shown = self.activation(new_c)
        return (nn.sigmoid(o) * shown).astype(self.dtype), new_c

    def start(self, num_examples: int) -> Carry:
        """Returns h and c before the first step: zeros [N, features]."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return *super().start(num_examples), jnp.zeros((num_examples, self.features), wide)

    def bias_init(self, key: Array, shape: tuple[int, ...], dtype: Any = "float32") -> Array:
        """Returns b at the start: `forget_bias` for the forget gate, which is the first; else 0."""
        return jnp.zeros(shape, dtype).at[: self.features].set(self.forget_bias)


CELLS: dict[str, type[Cell]] = {"lstm": LSTMCell, "simple": SimpleCell}
"""Cells by the name that a config has for them."""


def orthogonal_gates(
    gates: int, key: Array, shape: tuple[int, int], dtype: Any = "float32"
) -> Array:
    """Returns W_h [features, gates·features], each gate's square an orthogonal matrix."""
    square = shape[0], shape[1] // gates
    draw = nn.initializers.orthogonal()
    return jnp.concatenate([draw(k, square, dtype) for k in jax.random.split(key, gates)], -1)


class Recurrence(nn.Module):
    """A layer: a cell over time, W_x x computed for all steps at once.

    `make_cell(name=...)` makes the cell. `statistics`: at inference each step's own ("per_step") or
    the mean over all steps of them ("shared"), which Cooijmans et al. advise against; training is
    the same.
    """

    make_cell: Callable[..., Cell]
    conv: StandardConv
    statistics: str = "per_step"

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, T, F], mask [N] or [N, T] -> hidden states [N, T, features].

        What is masked touches no statistic. With a mask [N, T] a step that does not count leaves
        the example's state as it was, so sequences of any length up to T are padded. Raises
        ValueError in training if T is not the number of steps that the statistics are of.
        """
        num_examples, steps, _ = x.shape
        x = finite_where_masked(x, expand_mask(mask, x.shape))
        holds = mask is not None and mask.ndim == 2
        if mask is not None:
            mask = jnp.broadcast_to(mask.reshape(num_examples, -1), (num_examples, steps))
        cell = self.make_cell(name="cell")
        layer = self.conv.dense(cell.size, use_bias=False, dtype=cell.dtype, name="input")

        def step(cell: Cell, carry: Carry, inputs: Any) -> tuple[Carry, Array]:
            x, counts = inputs
            new = cell(carry, x, train=train, mask=counts)
            if holds:
                new = tuple(
                    jnp.where(counts[:, None], b, a) for a, b in zip(carry, new, strict=True)
                )
            return new, new[0]

        over_time = nn.scan(
            step,
            variable_axes=TIME_AXES,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        known = {len(leaf) for leaf in jax.tree.leaves(self.variables.get("batch_stats", {}))}
        if train and known - {steps}:
            raise ValueError(
                f"training on {steps} steps with statistics of {max(known)}: pad and mask sequences"
            )
        if not train and known and (known != {steps} or self.statistics == "shared"):
            shared = self.statistics == "shared"
            over_time = nn.map_variables(
                over_time,
                "batch_stats",
                functools.partial(statistics_of_steps, steps=steps, shared=shared),
            )
        _, hidden = over_time(cell, cell.start(num_examples), (layer(x), mask))
        return hidden


def statistics_of_steps(batch_stats: Any, *, steps: int, shared: bool) -> Any:
    """Returns the state [S, ...] for `steps` steps: beyond S the last; the mean if `shared`."""

    def choose(leaf: Array) -> Array:
        if shared and jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.broadcast_to(leaf.mean(0), (steps, *leaf.shape[1:]))
        return leaf[np.minimum(np.arange(steps), len(leaf) - 1)]

    return jax.tree.map(choose, batch_stats)

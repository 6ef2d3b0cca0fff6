"""Adaptive gradient clipping (AGC). Brock, De, Smith & Simonyan 2021, arXiv:2102.06171, section 4.

For each output unit i of a parameter (eq. 3), with G its gradient and W its weights:

    G_i ← λ·max(‖W_i‖, ε)/‖G_i‖ · G_i    if ‖G_i‖ > λ·max(‖W_i‖, ε),

ε = 1e-3, Frobenius norms over the unit's fan-in. It comes before weight decay and momentum. All
parameters are clipped but the classifier's weight (its bias is).

What a unit is depends on what a parameter *is*, and not on its rank: a kernel's last axis is its
outputs, whatever its rank (dense, convolutions of one to three dimensions, depthwise and grouped
ones); of a projection to several heads the last two are; a bias, gain or scalar is one unit as a
whole; and the first axes of what is stacked (layers of a scan, seeds) hold one parameter each.
`optax.adaptive_grad_clip` goes by rank, and takes the kernel of a 1-D convolution for a dense one.

As in the official code (deepmind-research/nfnets), ‖G_i‖ is at least 1e-6 where it divides.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from normlab.optim.masks import roles

HEADS = ("*query/kernel", "*key/kernel", "*value/kernel")
"""Kernels [inputs, heads, features] of Flax's attention: each feature of each head is a unit."""

Setting = Sequence[tuple[str, float]]


class Unit(NamedTuple):
    """How one parameter is clipped."""

    axes: tuple[int, ...]  # over which a unit's norm is taken; all but these count units
    clipping: float | None  # λ; None: left alone
    why: str  # of the axes, or of being left alone


class AGCState(NamedTuple):
    """What the last update did: the fraction of units clipped, by path of the parameter."""

    clipped: dict[str, Array]


def units(
    params: Any,
    clipping: float,
    *,
    exclude: Sequence[str] = ("head/kernel",),
    groups: Setting = (),
    stacked: Sequence[tuple[str, int]] = (),
) -> dict[str, Unit]:
    """Returns {path: how it is clipped} for each parameter of a tree (of arrays or shapes).

    Patterns are of paths, as in stage1_*/conv1/kernel. `exclude`: what is left alone; `groups`:
    (pattern, λ) where it differs, the last that fits holds; `stacked`: (pattern, number of first
    axes that hold one parameter each). Raises ValueError for more of those than a parameter has.
    """
    shapes, kinds = flatten_dict(params, sep="/"), flatten_dict(roles(params), sep="/")
    found = {}
    for path, leaf in shapes.items():
        fitting = [count for pattern, count in stacked if fnmatchcase(path, pattern)]
        first = fitting[-1] if fitting else 0
        if first > leaf.ndim:
            raise ValueError(f"{path} has {leaf.ndim} axes; it cannot have {first} stacked ones")
        last, why = leaf.ndim, f"{kinds[path]}: one unit"
        if kinds[path] == "kernel":
            # Without an axis of heads it is a plain dense layer that is called query.
            heads = last - first > 2 and any(fnmatchcase(path, pattern) for pattern in HEADS)
            last -= 2 if heads else 1
            why = "kernel: a unit for each feature of each head" if heads else "kernel: outputs"
        if first:
            why += f", {first} stacked axes" if first > 1 else ", stacked"
        limits = [value for pattern, value in groups if fnmatchcase(path, pattern)]
        limit: float | None = limits[-1] if limits else clipping
        excluded = [pattern for pattern in exclude if fnmatchcase(path, pattern)]
        if excluded:
            limit, why = None, f"excluded by {excluded[-1]}"
        found[path] = Unit(tuple(range(first, last)), limit, why)
    return found


def clip_unit(
    gradient: Array, weights: Array, axes: tuple[int, ...], clipping: float, epsilon: float
) -> tuple[Array, Array]:
    """Returns the clipped gradient and the fraction of units that were clipped, []."""
    norm, limit = _norm(gradient, axes), clipping * jnp.maximum(_norm(weights, axes), epsilon)
    above = norm > limit
    factor = jnp.where(above, limit / jnp.maximum(norm, 1e-6), 1.0)
    return (gradient * factor).astype(gradient.dtype), jnp.mean(above, dtype=jnp.float32)


def _norm(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns the norm over `axes`, which stay as axes of length 1; in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))


def adaptive_grad_clip(
    clipping: float, epsilon: float = 1e-3, **how: Any
) -> optax.GradientTransformation:
    """Returns the transformation; its update needs the parameters. `how`: as of `units`."""

    def init(params: Any) -> AGCState:
        found = units(params, clipping, **how)
        clipped = {path for path, unit in found.items() if unit.clipping is not None}
        return AGCState({path: jnp.zeros((), jnp.float32) for path in sorted(clipped)})

    def update(gradients: Any, state: AGCState, params: Any = None) -> tuple[Any, AGCState]:
        if params is None:
            raise ValueError("adaptive gradient clipping needs the parameters")
        weights, flat = flatten_dict(params, sep="/"), flatten_dict(gradients, sep="/")
        clipped = {}
        for path, unit in units(params, clipping, **how).items():
            if unit.clipping is not None:
                flat[path], clipped[path] = clip_unit(
                    flat[path], weights[path], unit.axes, unit.clipping, epsilon
                )
        return unflatten_dict(flat, sep="/"), AGCState(dict(sorted(clipped.items())))

    return optax.GradientTransformation(init, update)


def clipped_fractions(opt_state: Any) -> Mapping[str, Array]:
    """Returns {parameter/clipped: fraction} of an optimizer's state; empty without AGC in it."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AGCState))
    found = [leaf for leaf in leaves if isinstance(leaf, AGCState)]
    return {f"{path}/clipped": value for state in found for path, value in state.clipped.items()}

"""What the converters share: strict names, shapes and settings."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from normlab.config import flatten
from normlab.errors import UserError, nearest, unknown
from normlab.norms import NORMS

Arrays = dict[str, np.ndarray]
Tree = dict[str, Any]

PARAMS = ("scale", "bias")
REQUIRED = inspect.Parameter.empty
"""The default of an argument that has none."""

_PER_ELEMENT = ("layer_norm", "rms_norm")


# Arrays ------------------------------------------------------------------------------------------


def renamed(
    entries: Mapping[str, Any], names: Mapping[str, str], optional: Collection[str], what: str
) -> Arrays:
    """Returns copies of the entries under their new names (`names`: old -> new).

    Raises UserError for an entry that `names` lacks, and for one missing that is not `optional`.
    """
    for name in entries:
        if name not in names:
            raise unknown(f"entry of {what}:", name, names)
    for name in names:
        if name not in entries and name not in optional:
            raise UserError(f"{what} lacks {name!r}")
    return {new: copied(entries[old]) for old, new in names.items() if old in entries}


def copied(value: Any) -> np.ndarray:
    """Returns a contiguous copy: whoever owns the value may go on to change it in place."""
    return np.asarray(value).copy(order="C")


def variables_of(
    kind: str, entries: Mapping[str, Any], names: Mapping[str, str], what: str
) -> Tree:
    """Returns the variables of a normalizer from a framework's entries (`names`: theirs -> ours).

    Scale and bias may be absent. Raises UserError for entries that do not fit (`check_shapes`).
    """
    optional = [theirs for theirs, ours in names.items() if ours in PARAMS]
    flat = renamed(entries, names, optional, what)
    check_shapes(kind, {old: flat[new] for old, new in names.items() if new in flat}, what)
    params = {name: value for name, value in flat.items() if name in PARAMS}
    state = {name: value for name, value in flat.items() if name not in PARAMS}
    return {name: part for name, part in (("params", params), ("batch_stats", state)) if part}


def entries_of(
    kind: str, variables: Mapping[str, Any], names: Mapping[str, str], framework: str
) -> Arrays:
    """Returns a framework's entries from the variables of a normalizer (`names`: theirs -> ours).

    Raises UserError for variables that do not fit, or have no place in the framework.
    """
    what = f"{kind} for {framework}"
    flat: Tree = {}
    for collection, part in variables.items():
        if collection not in ("params", "batch_stats"):
            raise unknown(f"collection of {kind}:", collection, ("params", "batch_stats"))
        flat |= part
    entries = renamed(flat, {ours: theirs for theirs, ours in names.items()}, PARAMS, what)
    check_shapes(kind, {ours: entries[old] for old, ours in names.items() if old in entries}, what)
    return entries


def check_shapes(kind: str, arrays: Arrays, what: str) -> None:
    """Raises UserError unless all arrays have one shape, [C], and all counters (integers) [].

    Of a normalizer that may have a gain per element, the shape is that of an example.
    """
    first, shape = "", ()
    for name, value in arrays.items():
        expected: tuple[int, ...] = shape
        if np.issubdtype(value.dtype, np.integer):
            expected = ()
        elif not first:
            first, shape = name, value.shape
            if value.ndim == 1 or (value.ndim > 1 and kind in _PER_ELEMENT):
                continue
            raise UserError(f"{what}: {name!r} has shape {shape}, not that of channels")
        if value.shape != expected:
            like = f", unlike {first!r}: {expected}" if expected else ", not ()"
            raise UserError(f"{what}: {name!r} has shape {value.shape}{like}")


# Whole models ------------------------------------------------------------------------------------

Place = tuple[tuple[str, ...], tuple[int, ...]]
"""Path and shape of one of a model's variables: (collection, modules..., entry), (..., C)."""


def model_places(model: nn.Module, image_shape: tuple[int, int, int] = (32, 32, 3)) -> list[Place]:
    """Returns the places of the variables of a model of such images, computing nothing."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    flat = traverse_util.flatten_dict(shapes)
    return [(path, value.shape) for path, value in flat.items()]


def placed(
    entries: Mapping[str, Any],
    places: Mapping[str, Place],
    ours: Callable[[tuple[str, ...], np.ndarray], np.ndarray],
    theirs: Callable[[Place], tuple[int, ...]],
    what: str,
) -> Tree:
    """Returns the variables of a model from a framework's entries (`places`: their name -> place).

    `ours` lays the entry for a path out as ours is, and `theirs` gives the shape that a place's
    entry has there. Raises UserError for an entry without a place, one that is missing, one of
    another shape, or one that is not finite.
    """
    for name in entries:
        if name not in places:
            raise unknown(f"entry of {what}:", name, places)
    variables = {}
    for name, (path, shape) in places.items():
        if name not in entries:
            raise UserError(f"{what} lacks {name!r}")
        found, expected = np.shape(entries[name]), theirs((path, shape))
        if found != expected:
            raise UserError(f"{what}: {name!r} has shape {found}, not {expected}")
        with np.errstate(over="ignore"):  # of float64 that float32 does not reach
            variables[path] = copied(ours(path, np.asarray(entries[name])))
        if not np.isfinite(variables[path]).all():
            raise UserError(f"{what}: {name!r} is not finite")
    return traverse_util.unflatten_dict(variables)


def check_fields(config: ConfigDict, expected: Mapping[str, Any], what: str) -> None:
    """Raises UserError for a field of a config that is not as weights of another package need it.

    `expected`: the value of each field by its dotted name, or a tuple of values that will do.
    """
    fields = flatten(config)
    for name, values in expected.items():
        allowed = values if isinstance(values, tuple) else (values,)
        if fields.get(name) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise UserError(
                f"config field {name!r} = {fields.get(name)!r} is not that of {what}: {wanted}"
            )


# Settings ----------------------------------------------------------------------------------------


def settings(
    given: Mapping[str, Any],
    carried: Mapping[str, Any],
    fixed: Mapping[str, Any],
    what: str,
    other: str,
) -> Tree:
    """Returns the carried settings: as given, else their defaults (the values of `carried`).

    Raises UserError for one that is neither carried nor fixed, for one of the fixed that has
    another value than the one that `other` can express, and for one missing that is REQUIRED.
    """
    for name, value in given.items():
        if name not in carried and name not in fixed:
            options = [*carried, *fixed]
            raise UserError(f"{what} {name!r} is not converted{nearest(name, options)}")
        if name in fixed and value != fixed[name]:
            raise UserError(
                f"{what} {name!r} = {value!r} has no counterpart in {other}; {fixed[name]!r} has"
            )
    for name, default in carried.items():
        if default is REQUIRED and name not in given:
            raise UserError(f"{what} {name!r} is missing; it has no default")
    return {name: given.get(name, default) for name, default in carried.items()}


def fields_of(
    kind: str, given: Mapping[str, Any], carried: Sequence[str], framework: str, **other: Any
) -> Tree:
    """Returns the carried fields of a normalizer, its own defaults filled in.

    Every other field must have its default, or what `other` says. Raises UserError for one that has
    not, e.g. `zero_debias` for PyTorch.
    """
    own = {
        field.name: field.default
        for field in dataclasses.fields(NORMS[kind])
        if field.name not in ("parent", "name") and not field.name.endswith("_init")
    }
    fixed = {name: other.get(name, value) for name, value in own.items() if name not in carried}
    mine = {name: own[name] for name in carried}
    # Our own default may be one of those that the framework cannot express.
    return settings({**own, **given}, mine, fixed, f"{kind} field", framework)


def check_kind(kind: str, kinds: Collection[str], framework: str) -> None:
    """Raises UserError for a normalizer that is not converted."""
    if kind not in kinds:
        raise unknown(f"normalizer of {framework}:", kind, kinds)


def axes_of(axis: Any, what: str) -> str:
    """Returns our `axes` for the axes over which a layer of another framework takes statistics.

    -1 is `channel`; all axes but the first, as (1, 2, 3), (-3, -2, -1) or slice(1, None), are
    `all`. Raises UserError for others.
    """
    if axis == slice(1, None):
        return "all"
    listed = sorted([axis] if isinstance(axis, int) else axis)
    if listed == [-1]:
        return "channel"
    count = len(listed)
    if count > 1 and listed in (list(range(1, count + 1)), list(range(-count, 0))):
        return "all"
    raise UserError(f"{what} over axes {axis} has no counterpart: -1, or all but the first")


def example_axes(axes: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the axes, counted from the last, of our `axes` in examples of a shape (..., C)."""
    return (-1,) if axes == "channel" else tuple(range(-len(shape), 0))

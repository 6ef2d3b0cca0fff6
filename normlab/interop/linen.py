"""flax.linen: its own BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm and WeightNorm.

Names, layout, momentum and the biased running variance are ours, so arrays are only checked and
copied; defaults differ (momentum 0.99, epsilon 1e-6 but for BatchNorm). Not carried over: dtypes,
`use_fast_variance` (E[x²] − E[x]², which rounds otherwise than ours) and `axis_index_groups`.
WeightNorm adds 1e-12 to ‖v‖² inside the root; ours adds nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from normlab.errors import UserError
from normlab.interop.common import (
    Arrays,
    Tree,
    axes_of,
    check_kind,
    entries_of,
    example_axes,
    fields_of,
    renamed,
    settings,
    variables_of,
)

_AFFINE = {"scale": "scale", "bias": "bias"}
NAMES = {
    "batch_norm": {**_AFFINE, "mean": "mean", "var": "var"},
    "layer_norm": _AFFINE,
    "group_norm": _AFFINE,
    "instance_norm": _AFFINE,
    "rms_norm": {"scale": "scale"},
}
"""Entries, by kind, with our names."""

_COMMON = {"epsilon": 1e-6, "use_scale": True, "use_bias": True}
DEFAULTS: dict[str, Tree] = {
    "batch_norm": {**_COMMON, "epsilon": 1e-5, "momentum": 0.99, "axis_name": None},
    "layer_norm": {**_COMMON, "reduction_axes": -1, "feature_axes": -1},
    "group_norm": {**_COMMON, "num_groups": 32, "group_size": None},
    "instance_norm": _COMMON,
    "rms_norm": {"epsilon": 1e-6, "use_scale": True, "reduction_axes": -1, "feature_axes": -1},
}
"""Arguments that are carried over, with Flax's defaults."""

_FIXED: dict[str, Tree] = {
    "batch_norm": {"axis": -1, "use_running_average": None},
    "group_norm": {"reduction_axes": None},
    "instance_norm": {"feature_axes": -1},
}


def norm_variables(kind: str, theirs: Mapping[str, Any]) -> Tree:
    """Returns our variables from those of a linen module. Raises UserError if they do not fit."""
    check_kind(kind, NAMES, "flax.linen")
    entries = entries_of(kind, theirs, NAMES[kind], "flax.linen")
    return variables_of(kind, entries, NAMES[kind], f"flax.linen's {kind}")


def norm_state(kind: str, variables: Mapping[str, Any]) -> Tree:
    """Returns the variables of a linen module from ours. Raises UserError if they do not fit."""
    return norm_variables(kind, variables)


def norm_fields(kind: str, arguments: Mapping[str, Any]) -> Tree:
    """Returns our fields from those of a linen module.

    Raises UserError for one that we do not have, or a value that we cannot express.
    """
    check_kind(kind, NAMES, "flax.linen")
    what = f"argument of flax.linen's {kind}"
    fields = settings(arguments, DEFAULTS[kind], _FIXED.get(kind, {}), what, "normlab")
    if "reduction_axes" in fields:
        axes = axes_of(fields.pop("reduction_axes"), what)
        features = axes_of(fields.pop("feature_axes"), what)
        if axes == "channel" and features == "all":
            raise UserError(f"{what} 'feature_axes' must be -1 where 'reduction_axes' is")
        fields |= {"axes": axes, "elementwise": features == "all"}
    if kind == "group_norm" and fields["group_size"] is not None:
        del fields["num_groups"]
    if kind == "rms_norm":
        fields["use_bias"] = False
    return fields


def norm_arguments(kind: str, fields: Mapping[str, Any], shape: Sequence[int]) -> Tree:
    """Returns the fields of a linen module from ours; `shape` (..., C) is an example's.

    Raises UserError for a field that linen cannot express.
    """
    check_kind(kind, NAMES, "flax.linen")
    carried = [name for name in DEFAULTS[kind] if name not in ("reduction_axes", "feature_axes")]
    over_axes = kind in ("layer_norm", "rms_norm")
    if over_axes:
        carried += ["axes", "elementwise"]
    arguments = fields_of(kind, fields, carried, "flax.linen")
    if over_axes:
        axes = example_axes(arguments.pop("axes"), shape)
        per_element = arguments.pop("elementwise")
        arguments |= {"reduction_axes": axes, "feature_axes": axes if per_element else (-1,)}
    if kind == "group_norm" and arguments["group_size"] is not None:
        arguments["num_groups"] = None
    return arguments


def layer_params(theirs: Mapping[str, Any], name: str = "layer_instance") -> Arrays:
    """Returns `kernel`, `gain` and perhaps `bias` of a layer from the `params` of its WeightNorm.

    `name`: of the wrapped layer; where it has one of its own, its params stand beside those of the
    wrapper, so give `{name: params[name], **params[wrapper]}`. Raises UserError if they do not fit.
    """
    gain, what = f"{name}/kernel/scale", "flax.linen's WeightNorm"
    parts = dict(theirs)
    if name not in parts:
        raise UserError(f"{what} lacks {name!r}")
    parts |= parts.pop(name)
    return renamed(parts, {"kernel": "kernel", "bias": "bias", gain: "gain"}, ("bias",), what)


def layer_state(params: Mapping[str, Any], name: str = "layer_instance") -> Tree:
    """Returns the `params` of a WeightNorm around a layer; see `layer_params`."""
    names = {"kernel": "kernel", "bias": "bias", "gain": "gain"}
    parts = renamed(params, names, ("bias",), "layer for flax.linen's WeightNorm")
    gain = parts.pop("gain")
    return {name: parts, f"{name}/kernel/scale": gain}

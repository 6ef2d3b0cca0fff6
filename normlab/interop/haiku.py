"""dm-haiku: BatchNorm, LayerNorm, GroupNorm, InstanceNorm and RMSNorm.

A state is the pair of trees (params, state) of `hk.transform_with_state`, from which the module is
taken by its `name`, e.g. "batch_norm". Haiku's BatchNorm keeps zero-debiased averages: that is
`zero_debias=True` with `momentum=decay_rate`, its counter our `step`, its `average` our mean and
var. `hidden`, the average before the division, is average·(1 − decayᵗ): not read, and written to
rounding. The running variance is biased. Of a module that has only been initialized, `average` is
that of the first batch and the counter 0; the first update forgets it, here as there.

Some gains have the input's rank: [1, ..., 1, C] in BatchNorm, [1, H, W, C] in LayerNorm and
RMSNorm with one per element.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from normlab.errors import UserError, nearest, unknown
from normlab.interop.common import (
    REQUIRED,
    Tree,
    axes_of,
    check_kind,
    entries_of,
    example_axes,
    fields_of,
    settings,
    variables_of,
)
from normlab.norms.group import divide_channels

_AFFINE = {"scale": "scale", "offset": "bias"}
NAMES = {
    "batch_norm": {
        **_AFFINE,
        "mean_ema/average": "mean",
        "var_ema/average": "var",
        "mean_ema/counter": "step",
    },
    "layer_norm": _AFFINE,
    "group_norm": _AFFINE,
    "instance_norm": _AFFINE,
    "rms_norm": {"scale": "scale"},
}
"""Entries, by kind, with our names."""

_COMMON = {"eps": 1e-5, "create_scale": True, "create_offset": True}
DEFAULTS: dict[str, Tree] = {
    "batch_norm": {**_COMMON, "decay_rate": REQUIRED, "cross_replica_axis": None},
    "layer_norm": {**_COMMON, "axis": REQUIRED, "param_axis": None},
    "group_norm": {**_COMMON, "groups": REQUIRED},
    "instance_norm": _COMMON,
    "rms_norm": {"eps": 1e-5, "create_scale": True, "axis": REQUIRED, "param_axis": None},
}
"""Arguments that are carried over, with Haiku's defaults."""

_FIXED: dict[str, Tree] = {
    "batch_norm": {"axis": None, "data_format": "channels_last"},
    "group_norm": {"axis": slice(1, None), "data_format": "channels_last"},
    "instance_norm": {"data_format": "channels_last"},
}


def norm_variables(
    kind: str, params: Mapping[str, Any], state: Mapping[str, Any] | None = None, *, name: str
) -> Tree:
    """Returns our variables from the trees of a network, of its module `name`.

    Raises UserError if they do not fit.
    """
    check_kind(kind, NAMES, "Haiku")
    what, state = f"Haiku's {kind}", state or {}
    stateful = kind == "batch_norm"
    if params and name not in params and not stateful:
        raise unknown("module of Haiku:", name, params)
    flat = dict(params.get(name, {}))
    for average in ("mean_ema", "var_ema") if stateful else ():
        module = f"{name}/~/{average}"
        if module not in state:
            raise UserError(f"{what} lacks {module!r}{nearest(module, state)}")
        flat |= {f"{average}/{entry}": value for entry, value in state[module].items()}
        flat.pop(f"{average}/hidden", None)
    flat.pop("var_ema/counter", None)  # it goes with the mean's
    entries = {key: _without_rank(kind, value) for key, value in flat.items()}
    return variables_of(kind, entries, NAMES[kind], what)


def norm_state(
    kind: str,
    variables: Mapping[str, Any],
    *,
    name: str,
    rank: int | None = None,
    decay_rate: float | None = None,
) -> tuple[Tree, Tree]:
    """Returns (params, state) of the module `name` from our variables.

    batch_norm needs the input's `rank` and its `decay_rate`. Raises UserError if they do not fit.
    """
    check_kind(kind, NAMES, "Haiku")
    entries = entries_of(kind, variables, NAMES[kind], "Haiku")
    if kind != "batch_norm":
        # A gain per element has the rank of the input.
        params = {key: value[None] if value.ndim > 1 else value for key, value in entries.items()}
        return ({name: params} if params else {}), {}
    if rank is None or decay_rate is None:
        raise UserError("batch_norm for Haiku needs the input's rank and the module's decay_rate")
    counter = entries.pop("mean_ema/counter")
    shape = (1,) * (rank - 1)
    wide = {key: value.reshape(*shape, -1) for key, value in entries.items()}
    share = 1 - decay_rate ** int(counter)
    state = {}
    for key in ("mean_ema", "var_ema"):
        average = wide.pop(f"{key}/average")
        hidden = (average * share).astype(average.dtype)
        state[f"{name}/~/{key}"] = {"average": average, "hidden": hidden, "counter": counter.copy()}
    return ({name: wide} if wide else {}), state


def norm_fields(kind: str, arguments: Mapping[str, Any]) -> Tree:
    """Returns our fields from the keywords of a module's constructor.

    Raises UserError for one that we do not have, or a value that we cannot express.
    """
    check_kind(kind, NAMES, "Haiku")
    what = f"argument of Haiku's {kind}"
    given = settings(arguments, DEFAULTS[kind], _FIXED.get(kind, {}), what, "normlab")
    fields = {"epsilon": given["eps"], "use_scale": given["create_scale"]}
    fields["use_bias"] = given.get("create_offset", False)
    if kind == "batch_norm":
        fields |= {"momentum": given["decay_rate"], "zero_debias": True}
        fields["axis_name"] = given["cross_replica_axis"]
    if kind == "group_norm":
        fields["num_groups"] = given["groups"]
    if "axis" in given:
        axes = axes_of(given["axis"], what)
        features = axes_of(-1 if given["param_axis"] is None else given["param_axis"], what)
        if axes == "channel" and features == "all":
            raise UserError(f"{what} 'param_axis' must be -1 where 'axis' is")
        fields |= {"axes": axes, "elementwise": features == "all"}
    return fields


def norm_arguments(kind: str, fields: Mapping[str, Any], shape: Sequence[int]) -> Tree:
    """Returns the keywords of a module's constructor from our fields.

    `shape`, (..., C), is an example's. Raises UserError for a field that Haiku cannot express:
    BatchNorm's averages, say, have to be zero-debiased.
    """
    check_kind(kind, NAMES, "Haiku")
    carried, other = ["epsilon", "use_scale", "use_bias"], {}
    if kind == "batch_norm":
        carried, other = [*carried, "momentum", "axis_name"], {"zero_debias": True}
    if kind == "group_norm":
        carried += ["num_groups", "group_size"]
    if kind in ("layer_norm", "rms_norm"):
        carried = [*carried[: 3 if kind == "layer_norm" else 2], "axes", "elementwise"]
    given = fields_of(kind, fields, carried, "Haiku", **other)
    arguments: Tree = {"eps": given["epsilon"], "create_scale": given["use_scale"]}
    if "use_bias" in given:
        arguments["create_offset"] = given["use_bias"]
    if kind == "batch_norm":
        arguments["decay_rate"] = given["momentum"]
        arguments["cross_replica_axis"] = given["axis_name"]
    if kind == "group_norm":
        arguments["groups"] = divide_channels(
            shape[-1], given["num_groups"], given["group_size"], strict=False
        )
    if "axes" in given:
        axes = example_axes(given["axes"], shape)
        arguments |= {"axis": axes, "param_axis": axes if given["elementwise"] else (-1,)}
    return arguments


def _without_rank(kind: str, value: Any) -> np.ndarray:
    """Returns a gain or statistic [1, ..., 1, C] as [C], and one per element as an example's."""
    array = np.asarray(value)
    if kind == "batch_norm" and array.ndim > 1 and array.size == array.shape[-1]:
        return array.reshape(-1)
    per_element = kind in ("layer_norm", "rms_norm") and array.ndim > 1
    return array[0] if per_element and array.shape[0] == 1 else array

"""PyTorch: `torch.nn` normalizers, weight norm, and torchvision's ResNets.

A state is what `module.state_dict()` gives: by name, values that numpy can read (no bfloat16), laid
out channels first. Conventions:

* BatchNorm1d, 2d, 3d and SyncBatchNorm: `momentum` is the weight of the new value, one minus ours;
  the running variance is unbiased (`running_variance="unbiased"`); its numbers are taken as they
  are, which is right for evaluation whatever was averaged. `num_batches_tracked` matters only
  with momentum=None, a plain mean over all batches, which is refused: it is not kept, and written
  as what `norm_state` is given.
* LayerNorm and RMSNorm over (C,) are ours with axes="channel"; over (C, H, W) those with axes="all"
  and elementwise=True. Ours with a gain per channel over "all" is GroupNorm(1, C).
* RMSNorm's eps=None is the input dtype's rounding unit, taken as float32's.
* InstanceNorm has no gain and bias by default. With `track_running_stats` it is refused: ours has
  no state.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from normlab.errors import UserError, unknown
from normlab.interop.common import (
    REQUIRED,
    Arrays,
    Place,
    Tree,
    check_kind,
    copied,
    entries_of,
    fields_of,
    model_places,
    placed,
    renamed,
    settings,
    variables_of,
)
from normlab.norms.group import divide_channels

_AFFINE = {"weight": "scale", "bias": "bias"}
NAMES = {
    "batch_norm": {**_AFFINE, "running_mean": "mean", "running_var": "var"},
    "layer_norm": _AFFINE,
    "group_norm": _AFFINE,
    "instance_norm": _AFFINE,
    "rms_norm": {"weight": "scale"},
}
"""Entries of a state, by kind, with our names."""

DEFAULTS: dict[str, Tree] = {
    "batch_norm": {"num_features": None, "eps": 1e-5, "momentum": 0.1, "affine": True},
    "layer_norm": {"normalized_shape": REQUIRED, "eps": 1e-5, "elementwise_affine": True},
    "group_norm": {"num_groups": REQUIRED, "num_channels": None, "eps": 1e-5, "affine": True},
    "instance_norm": {"num_features": None, "eps": 1e-5, "affine": False},
    "rms_norm": {"normalized_shape": REQUIRED, "eps": None, "elementwise_affine": True},
}
"""Arguments that are carried over, with PyTorch's defaults; channels need not be given."""

_FIXED: dict[str, Tree] = {
    "batch_norm": {"track_running_stats": True},
    "instance_norm": {"track_running_stats": False},
}
_COUNTER = "num_batches_tracked"


# Normalizers -------------------------------------------------------------------------------------


def norm_variables(kind: str, state: Mapping[str, Any]) -> Tree:
    """Returns our variables from the state of a module. Raises UserError if it does not fit."""
    check_kind(kind, NAMES, "PyTorch")
    if kind == "batch_norm":
        state = {name: value for name, value in state.items() if name != _COUNTER}
    variables = variables_of(kind, state, NAMES[kind], f"PyTorch's {kind}")
    return jax.tree.map(lambda value: copied(np.moveaxis(value, 0, -1)), variables)


def norm_state(kind: str, variables: Mapping[str, Any], *, num_batches_tracked: int = 0) -> Arrays:
    """Returns the state of a module from our variables. Raises UserError if they do not fit."""
    check_kind(kind, NAMES, "PyTorch")
    entries = entries_of(kind, variables, NAMES[kind], "PyTorch")
    state = {name: copied(np.moveaxis(value, -1, 0)) for name, value in entries.items()}
    if kind == "batch_norm":
        state[_COUNTER] = np.array(num_batches_tracked)
    return state


def norm_fields(kind: str, arguments: Mapping[str, Any]) -> Tree:
    """Returns our fields from the keywords of a module's constructor.

    Raises UserError for one that we do not have, or a value that we cannot express.
    """
    check_kind(kind, NAMES, "PyTorch")
    what = f"argument of PyTorch's {kind}"
    bias = {} if kind == "rms_norm" else {"bias": True}
    carried = DEFAULTS[kind] | bias
    given = settings(arguments, carried, _FIXED.get(kind, {}), what, "normlab")
    affine = given["affine" if "affine" in given else "elementwise_affine"]
    fields: Tree = {"epsilon": given["eps"], "use_scale": affine}
    fields["use_bias"] = affine and given.get("bias", False)
    if kind == "batch_norm":
        if given["momentum"] is None:
            raise UserError(f"{what} 'momentum' = None, a plain mean, has no counterpart")
        fields |= {"momentum": _complement(given["momentum"]), "running_variance": "unbiased"}
    if kind == "group_norm":
        fields["num_groups"] = given["num_groups"]
    if kind in ("layer_norm", "rms_norm"):
        shape = given["normalized_shape"]
        per_element = not isinstance(shape, int) and len(shape) > 1
        fields["axes"] = "all" if per_element else "channel"
        fields["elementwise"] = per_element
    if kind == "rms_norm" and fields["epsilon"] is None:
        fields["epsilon"] = float(np.finfo(np.float32).eps)
    return fields


def norm_arguments(kind: str, fields: Mapping[str, Any], shape: Sequence[int]) -> Tree:
    """Returns the keywords of a module's constructor from our fields.

    `shape`, (..., C), is an example's, channels last. Raises UserError for a field that PyTorch
    cannot express: BatchNorm's stored variance, say, has to be "unbiased".
    """
    check_kind(kind, NAMES, "PyTorch")
    channels = shape[-1]
    if kind in ("layer_norm", "rms_norm"):
        return _layer_arguments(kind, fields, shape)
    carried, other = ["epsilon", "use_scale", "use_bias"], {}
    if kind == "batch_norm":
        carried, other = [*carried, "momentum"], {"running_variance": "unbiased"}
    if kind == "group_norm":
        carried += ["num_groups", "group_size"]
    given = fields_of(kind, fields, carried, "PyTorch", **other)
    arguments: Tree = {"eps": given["epsilon"], **_affine(kind, "affine", given)}
    if kind == "batch_norm":
        arguments["momentum"] = _complement(given["momentum"])
    if kind == "group_norm":
        groups = divide_channels(channels, given["num_groups"], given["group_size"], strict=False)
        return {"num_groups": groups, "num_channels": channels, **arguments}
    return {"num_features": channels, **arguments}


def _layer_arguments(kind: str, fields: Mapping[str, Any], shape: Sequence[int]) -> Tree:
    carried = ["epsilon", "axes", "elementwise", "use_scale"]
    given = fields_of(kind, fields, [*carried, *["use_bias"] * (kind == "layer_norm")], "PyTorch")
    over_all = given["axes"] == "all" and len(shape) > 1
    if over_all and not given["elementwise"] and given["use_scale"]:
        raise UserError(
            f"{kind} field 'elementwise' = False over 'all' has no counterpart in PyTorch's, whose "
            f"gain is per element; {'GroupNorm(1, C) has' if kind == 'layer_norm' else 'True has'}"
        )
    normalized = (shape[-1], *shape[:-1]) if over_all else (shape[-1],)
    arguments = {"normalized_shape": normalized, "eps": given["epsilon"]}
    return arguments | _affine(kind, "elementwise_affine", given)


def _affine(kind: str, name: str, fields: Tree) -> Tree:
    scale, bias = fields["use_scale"], fields.get("use_bias", fields["use_scale"])
    if bias and not scale:
        raise UserError(f"{kind} with 'use_bias' and no 'use_scale' has no counterpart in PyTorch")
    return {name: scale} if scale == bias else {name: True, "bias": False}


def _complement(momentum: float) -> float:
    """Returns 1 − momentum, to 15 digits: twice is the same number again."""
    return round(1 - momentum, 15)


# Convolutions and dense layers, with and without weight norm --------------------------------------

_WEIGHT_NORM = {
    "weight_g": ("weight_g", "weight_v"),
    "parametrizations": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}
"""The names of g and v, of `utils.weight_norm` and `utils.parametrizations.weight_norm`."""


def layer_params(state: Mapping[str, Any]) -> Arrays:
    """Returns `kernel`, perhaps `bias` and, under weight norm, `gain` of a layer of any rank.

    OIHW becomes HWIO and a matrix [O, I] its transpose [I, O]; weight norm is over dim 0, with g
    and v by either naming. Raises UserError for entries that do not fit.
    """
    what = "PyTorch's layer"
    for gain, direction in _WEIGHT_NORM.values():
        if gain in state or direction in state:
            names = {direction: "kernel", gain: "gain", "bias": "bias"}
            break
    else:
        names = {"weight": "kernel", "bias": "bias"}
    params = renamed(state, names, ("bias",), what)
    source = {ours: theirs for theirs, ours in names.items()}
    units = params["kernel"].shape[:1]
    for name, shape in (("gain", units + (1,) * (params["kernel"].ndim - 1)), ("bias", units)):
        if name in params and params[name].shape != shape:
            found = params[name].shape
            raise UserError(f"{what}: {source[name]!r} has shape {found}, not {shape}")
    params["kernel"] = _to_kernel(params["kernel"])
    if "gain" in params:
        params["gain"] = params["gain"].reshape(-1)
    return params


def layer_state(params: Mapping[str, Any], naming: str = "parametrizations") -> Arrays:
    """Returns the state of a layer from our `kernel`, `bias` and `gain`; see `layer_params`.

    `naming` of g and v: "parametrizations" or "weight_g".
    """
    if naming not in _WEIGHT_NORM:
        raise unknown("naming of weight norm", naming, _WEIGHT_NORM)
    gain, direction = _WEIGHT_NORM[naming]
    names = {"kernel": direction if "gain" in params else "weight", "bias": "bias", "gain": gain}
    state = renamed(params, names, ("bias", "gain"), "layer for PyTorch")
    weight = _to_weight(state[names["kernel"]])
    state[names["kernel"]] = weight
    if gain in state:
        state[gain] = state[gain].reshape(-1, *[1] * (weight.ndim - 1))
    return state


def _to_kernel(weight: np.ndarray) -> np.ndarray:
    """Returns [O, I, ...] as [..., I, O]."""
    return copied(np.moveaxis(weight, (0, 1), (-1, -2)))


def _to_weight(kernel: np.ndarray) -> np.ndarray:
    """Returns [..., I, O] as [O, I, ...]."""
    return copied(np.moveaxis(kernel, (-1, -2), (0, 1)))


# torchvision's ResNets ---------------------------------------------------------------------------


def resnet_variables(state: Mapping[str, Any], model: nn.Module) -> Tree:
    """Returns the variables of our ResNet-18, -34, -50, -101 or -152 from torchvision's state.

    `model` is ours, of that depth, width, number of classes and kind of normalizer; its fields are
    not set here: torchvision's BatchNorm is `momentum=0.9, running_variance="unbiased"`. Raises
    UserError for an entry that is missing, is not finite, has another shape, or has no place in the
    model.
    """
    places = {_resnet_name(path): (path, shape) for path, shape in model_places(model)}
    entries = {name: value for name, value in state.items() if not name.endswith(f".{_COUNTER}")}
    return placed(entries, places, laid_out, shape_there, "PyTorch's ResNet")


def laid_out(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """Returns an entry of a state as the variable at a path is laid out."""
    return _to_kernel(value) if path[-1] == "kernel" else value


def shape_there(place: Place) -> tuple[int, ...]:
    """Returns the shape that the entry for one of our variables has in a state."""
    path, shape = place
    return (*shape[:-3:-1], *shape[:-2]) if path[-1] == "kernel" else shape


def resnet_state(
    variables: Mapping[str, Any], model: nn.Module, *, num_batches_tracked: int = 0
) -> Arrays:
    """Returns torchvision's state from the variables of our ResNet; see `resnet_variables`."""
    flat = traverse_util.flatten_dict(dict(variables))
    shapes = dict(model_places(model))
    for path in flat:
        if path not in shapes:
            raise unknown("entry of our ResNet:", "/".join(path), ["/".join(p) for p in shapes])
    state: Arrays = {}
    for path, shape in shapes.items():
        if path not in flat:
            raise UserError(f"our ResNet lacks {'/'.join(path)!r}")
        value = np.asarray(flat[path])
        if value.shape != shape:
            raise UserError(f"our ResNet: {'/'.join(path)!r} has shape {value.shape}, not {shape}")
        name = _resnet_name(path)
        state[name] = _to_weight(value) if path[-1] == "kernel" else copied(value)
        if path[-1] == "var":
            layer = name.removesuffix(".running_var")
            state[f"{layer}.{_COUNTER}"] = np.array(num_batches_tracked)
    return state


_STEM = {"conv_stem": "conv1", "norm_stem": "bn1", "head": "fc"}
_SHORTCUT = {"conv_shortcut": "downsample.0", "norm_shortcut": "downsample.1"}
_ENTRIES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _resnet_name(path: tuple[str, ...]) -> str:
    """Returns torchvision's name for what stands at a path (collection, layers..., entry)."""
    *layers, entry = path[1:]
    names = []
    for layer in layers:
        block = re.fullmatch(r"stage(\d+)_block(\d+)", layer)
        if block:
            names.append(f"layer{block[1]}.{int(block[2]) - 1}")
        else:
            renamed_norm = re.sub(r"^norm(\d)", r"bn\1", layer)
            names.append(_STEM.get(layer) or _SHORTCUT.get(layer) or renamed_norm)
    return ".".join([*names, _ENTRIES.get(entry, entry)])

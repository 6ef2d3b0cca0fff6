"""Keras 3: its BatchNormalization, Layer-, Group- and RMSNormalization.

A state is `{weight.name: weight.numpy() for weight in layer.weights}`. Momentum and the biased
running variance are ours; defaults differ (momentum 0.99, epsilon 1e-3, RMSNormalization's 1e-6).
Instance norm is GroupNormalization with a group for each channel (`groups=-1`).

BatchNormalization(renorm=True) is `batch_renorm`, but keeps each average twice: `renorm_mean` and
`renorm_stddev` with `renorm_momentum` for r and d, `moving_mean` and `moving_stddev` with
`momentum` for inference. Ours is one average, so where the two differ it is refused, as are two
momenta.
Further: Keras clips r to [rmin, rmax], so rmin must be 1/rmax (or neither be given); it has no
ramps, so ours must end at update 0, and `step`, which then means nothing, is not kept;
`moving_variance`, which follows from `moving_stddev` as σ² − ε, is not read (before the first
update Keras has 1 there, and so evaluates by σ = √(1 + ε)).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from normlab.errors import UserError
from normlab.interop.common import (
    Arrays,
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

_AFFINE = {"gamma": "scale", "beta": "bias"}
NAMES = {
    "batch_norm": {**_AFFINE, "moving_mean": "mean", "moving_variance": "var"},
    "batch_renorm": {**_AFFINE, "renorm_mean": "mean", "renorm_stddev": "sigma"},
    "layer_norm": _AFFINE,
    "group_norm": _AFFINE,
    "instance_norm": _AFFINE,
    "rms_norm": {"scale": "scale"},
}
"""Weights, by kind, with our names."""

_COMMON = {"epsilon": 1e-3, "center": True, "scale": True}
DEFAULTS: dict[str, Tree] = {
    "batch_norm": {**_COMMON, "momentum": 0.99},
    "batch_renorm": {**_COMMON, "momentum": 0.99, "renorm_momentum": 0.99, "renorm_clipping": None},
    "layer_norm": {**_COMMON, "axis": -1},
    "group_norm": {**_COMMON, "groups": 32},
    "instance_norm": _COMMON,
    "rms_norm": {"epsilon": 1e-6, "axis": -1},
}
"""Arguments that are carried over, with Keras' defaults."""

_FIXED: dict[str, Tree] = {
    "batch_norm": {"axis": -1, "synchronized": False, "renorm": False},
    "batch_renorm": {"axis": -1, "synchronized": False, "renorm": True},
    "group_norm": {"axis": -1},
    "instance_norm": {"axis": -1, "groups": -1},
}
_TWICE = {"moving_mean": "renorm_mean", "moving_stddev": "renorm_stddev"}


def norm_variables(kind: str, weights: Mapping[str, Any]) -> Tree:
    """Returns our variables from the weights of a layer, by name.

    Raises UserError for weights that do not fit, and for renorm averages that are two.
    """
    check_kind(kind, NAMES, "Keras")
    what = f"Keras' {kind}"
    if kind != "batch_renorm":
        return variables_of(kind, weights, NAMES[kind], what)
    rest = {name: value for name, value in weights.items() if name not in _TWICE}
    rest.pop("moving_variance", None)
    variables = variables_of(kind, rest, NAMES[kind], what)
    for moving, renorm in _TWICE.items():
        if moving not in weights:
            raise UserError(f"{what} lacks {moving!r}")
        if not np.allclose(weights[moving], weights[renorm], rtol=1e-5, atol=1e-6):
            raise UserError(f"{what}: {moving!r} and {renorm!r} differ; normlab keeps one average")
    variables["batch_stats"]["step"] = np.zeros((), np.int32)
    return variables


def norm_state(kind: str, variables: Mapping[str, Any], *, epsilon: float | None = None) -> Arrays:
    """Returns the weights of a layer, by name, from our variables.

    `epsilon`, the layer's, is needed for batch_renorm, whose `moving_variance` is σ² − ε. Raises
    UserError for variables that do not fit.
    """
    check_kind(kind, NAMES, "Keras")
    if kind != "batch_renorm":
        return entries_of(kind, variables, NAMES[kind], "Keras")
    if epsilon is None:
        raise UserError("batch_renorm for Keras needs the layer's epsilon: its variance is σ² − ε")
    names = NAMES[kind] | {"step": "step"}
    weights = entries_of(kind, variables, names, "Keras")
    del weights["step"]
    for moving, renorm in _TWICE.items():
        weights[moving] = weights[renorm].copy()
    sigma = weights["renorm_stddev"]
    weights["moving_variance"] = np.maximum(sigma * sigma - sigma.dtype.type(epsilon), 0)
    return weights


def norm_fields(kind: str, arguments: Mapping[str, Any]) -> Tree:
    """Returns our fields from the keywords of a layer's constructor.

    Raises UserError for one that we do not have, or a value that we cannot express.
    """
    check_kind(kind, NAMES, "Keras")
    what = f"argument of Keras' {kind}"
    given = settings(arguments, DEFAULTS[kind], _FIXED.get(kind, {}), what, "normlab")
    fields: Tree = {"epsilon": given["epsilon"]}
    if kind != "rms_norm":
        fields |= {"use_scale": given["scale"], "use_bias": given["center"]}
    if "momentum" in given:
        fields["momentum"] = given["momentum"]
    if kind == "batch_renorm":
        if given["renorm_momentum"] != given["momentum"]:
            two = f"{given['renorm_momentum']} and 'momentum' = {given['momentum']}"
            raise UserError(f"{what} 'renorm_momentum' = {two}: normlab keeps one average")
        fields |= _limits(given["renorm_clipping"] or {}, what)
    if kind == "group_norm":
        one_each = given["groups"] == -1
        fields |= {"group_size": 1} if one_each else {"num_groups": given["groups"]}
    if "axis" in given:
        axes = axes_of(given["axis"], what)
        fields |= {"axes": axes, "elementwise": axes == "all"}
    return fields


def norm_arguments(kind: str, fields: Mapping[str, Any], shape: Sequence[int]) -> Tree:
    """Returns the keywords of a layer's constructor from our fields.

    `shape`, (..., C), is an example's. Raises UserError for a field that Keras cannot express.
    """
    check_kind(kind, NAMES, "Keras")
    affine = ["use_scale", "use_bias"] if kind != "rms_norm" else []
    carried = {
        "batch_norm": ["momentum"],
        "batch_renorm": ["momentum", "r_max", "d_max"],
        "group_norm": ["num_groups", "group_size"],
        "layer_norm": ["axes", "elementwise"],
        "rms_norm": ["axes", "elementwise"],
        "instance_norm": [],
    }[kind]
    ends = ("ramp_start_steps", "r_ramp_end_steps", "d_ramp_end_steps")
    other = dict.fromkeys(ends, 0) if kind == "batch_renorm" else {}
    given = fields_of(kind, fields, ["epsilon", *affine, *carried], "Keras", **other)
    arguments: Tree = {"epsilon": given["epsilon"]}
    if affine:
        arguments |= {"scale": given["use_scale"], "center": given["use_bias"]}
    if "momentum" in given:
        arguments["momentum"] = given["momentum"]
    if kind == "batch_renorm":
        clipping = {"rmax": given["r_max"], "rmin": 1 / given["r_max"], "dmax": given["d_max"]}
        arguments |= {"renorm": True, "renorm_momentum": given["momentum"]}
        arguments["renorm_clipping"] = clipping
    if kind == "group_norm":
        arguments["groups"] = divide_channels(
            shape[-1], given["num_groups"], given["group_size"], strict=False
        )
    if kind == "instance_norm":
        arguments["groups"] = -1
    if "axes" in given:
        over_all = given["axes"] == "all" and len(shape) > 1
        if over_all and not given["elementwise"]:
            raise UserError(
                f"{kind} field 'elementwise' = False over 'all' has no counterpart in Keras', whose"
                f" gain is per element{'; groups=1 has' if kind == 'layer_norm' else ''}"
            )
        arguments["axis"] = list(example_axes("all", shape)) if over_all else -1
    return arguments


def _limits(clipping: Mapping[str, float], what: str) -> Tree:
    """Returns r_max, d_max and ramps that are over, from Keras' `renorm_clipping`."""
    infinity = float("inf")
    r_max, r_min = clipping.get("rmax", infinity), clipping.get("rmin", 0.0)
    if not np.isclose(r_max * r_min, 1) and (r_max, r_min) != (infinity, 0):
        raise UserError(f"{what} 'renorm_clipping': rmin = {r_min} is not 1/rmax = {1 / r_max}")
    over = {"ramp_start_steps": 0, "r_ramp_end_steps": 0, "d_ramp_end_steps": 0}
    return {"r_max": r_max, "d_max": clipping.get("dmax", infinity), **over}

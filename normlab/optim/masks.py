"""Roles of parameters, by their path: what may be decayed, clipped or frozen.

A role never comes from a parameter's rank: a scanned or seed-stacked bias has rank two and is still
a bias.
"""

from collections.abc import Collection, Mapping
from typing import Any

from normlab.errors import unknown

ROLES = ("kernel", "bias", "norm_scale", "norm_bias", "norm_extra", "embedding")
"""Linear layers have kernel and bias; normalizers norm_scale, norm_bias, norm_extra (the rest).

The gain of a linear layer with normalized weights is a norm_scale. A model's own arrays, such as
the positions of a transformer, are embeddings; a cell's own bias is a bias.
"""

_LINEAR = {"bias": "bias", "gain": "norm_scale"}


def roles(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of `params` with each array replaced by its role.

    A module that holds a kernel is a linear layer, one that holds modules a model or a part of one;
    any other holder of arrays is a normalizer.
    """
    is_linear = "kernel" in params
    holds_modules = any(isinstance(value, Mapping) for value in params.values())
    tree: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            tree[name] = roles(value)
        elif is_linear:
            tree[name] = _LINEAR.get(name, "kernel")
        elif holds_modules:
            tree[name] = "bias" if name == "bias" else "embedding"
        else:
            tree[name] = f"norm_{name}" if name in ("scale", "bias") else "norm_extra"
    return tree


def role_mask(params: Mapping[str, Any], selected: Collection[str]) -> dict[str, Any]:
    """Returns the tree of `params` with True where the role is in `selected`.

    Raises UserError for a role that does not exist.
    """
    for role in selected:
        if role not in ROLES:
            raise unknown("role in 'optim.decay_roles'", role, ROLES)

    def select(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {k: select(v) if isinstance(v, dict) else v in selected for k, v in tree.items()}

    return select(roles(params))

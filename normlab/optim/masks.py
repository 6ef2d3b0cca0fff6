"""Roles of parameters, by their path: what may be decayed, clipped or frozen.

A role never comes from a parameter's rank: a scanned or seed-stacked bias has rank two and is still
a bias.
"""

from collections.abc import Collection, Mapping
from typing import Any

from normlab.errors import unknown

ROLES = ("kernel", "bias", "norm_scale", "norm_bias", "norm_extra", "skip_gain", "embedding")
"""Linear layers have kernel and bias; normalizers norm_scale, norm_bias, norm_extra (the rest).

The gain of a linear layer with normalized weights is a norm_scale. Of a model's own arrays, those
named `bias...` are biases (a cell's, Fixup's scalars), and the scalars that scale a residual branch
skip gains; all others, such as the positions of a transformer, are embeddings.
"""

_LINEAR = {"bias": "bias", "gain": "norm_scale"}
_SKIP_GAINS = ("skip_gain", "multiplier")  # SkipInit's, of normalizer-free nets; Fixup's


def roles(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of `params` with each array replaced by its role.

    A module that holds a kernel is a linear layer; one that holds modules, or a skip gain, a model
    or a part of one; any other holder of arrays is a normalizer.
    """
    is_linear = "kernel" in params
    is_block = any(
        name in _SKIP_GAINS or isinstance(value, Mapping) for name, value in params.items()
    )
    tree: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            is_bias = name.startswith("bias")  # a module that adds a bias and is nothing else
            tree[name] = dict.fromkeys(value, "bias") if is_bias else roles(value)
        elif is_linear:
            tree[name] = _LINEAR.get(name, "kernel")
        elif is_block:
            tree[name] = _of_block(name)
        else:
            tree[name] = f"norm_{name}" if name in ("scale", "bias") else "norm_extra"
    return tree


def _of_block(name: str) -> str:
    if name in _SKIP_GAINS:
        return "skip_gain"
    return "bias" if name.startswith("bias") else "embedding"


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

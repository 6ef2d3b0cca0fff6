"""DeepMind's published NFNets, F0 to F6, in ours: `nfnet_f0` to `nfnet_f6`.

The files (deepmind-research/nfnets, README: F0_haiku.npz and so on) are, despite their names,
pickles by dill of {module name: {parameter name: array}}, F0's 71,489,284 numbers of float32 in
285,976,842 bytes. They are read without being run (`data/pickles.py`). Names are Haiku's: what
stands behind `/~/` was made in its parent's constructor, and a second `nf_block` is `nf_block_1`.

    NFNet/~/stem_conv0                        w, gain, bias     conv_stem1
    NFNet/~/nf_block                          skip_gain         stage1_block1, and on through the
    NFNet/~/nf_block_1/~/conv1b               w, gain, bias       stages: stage2_block1/conv3
    NFNet/~/nf_block_1/~/squeeze_excite/~/linear_1   w, b         .../squeeze_excite/excite
    NFNet/~/final_conv                        w, gain, bias     conv_final
    NFNet/~/linear                            w, b              head

Layouts are the same. The weights are for activations times the released γ, `model.gain=released`,
and not for the default. The images they were evaluated with were 256 pixels wide for F0 (`nfnet.py`
has the others), resized to 32 more and cropped.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from normlab.data import describe
from normlab.data.pickles import load_arrays
from normlab.errors import UserError, quoted, unknown
from normlab.interop.common import Tree, check_fields, model_places, placed
from normlab.models import build

KINDS = tuple(f"nfnet_f{number}" for number in range(7))
"""Models whose weights were published."""

FLOATS = ("f2", "f4", "f8")
"""Kinds of numbers that a file may have; the published ones are of f4, float32."""

FIELDS = {
    "norm.kind": "none",
    "conv.kind": "scaled_weight_standardization",
    "conv.epsilon": 1e-4,
    "conv.epsilon_form": "floor",
    "conv.boundary": "zeros",
    "model.alpha": 0.2,
    "model.beta": "behind",
    "model.gain": "released",
    "model.activation": "gelu",
    "model.downsample": "pool",
    "model.padding": "same",
    "model.second_conv": True,
}
"""What a config must have for the weights to be the published network, beside shapes."""

_LINEAR = {"head": "linear", "squeeze": "linear", "excite": "linear_1"}


def load(path: Path, config: ConfigDict) -> Tree:
    """Returns the variables of the config's model from a published file.

    Raises UserError, one line, for a file that is none of them or is damaged, for one of another
    variant than the config's model, and for a config with which the weights are another network.
    """
    check_model(config)
    tree = read(Path(path))
    there, here = variant_of(tree), config.model.kind
    if there != here and there in KINDS:
        raise UserError(
            f"{str(path)!r} holds {there!r}, and 'model.kind' of the config is {here!r}"
        )
    return variables(tree, config)


def read(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns {module name: {parameter name: array}} of a file; raises UserError for another."""
    try:
        tree = load_arrays(path.read_bytes(), str(path), FLOATS)
    except OSError as error:
        raise UserError(f"file {str(path)!r} cannot be read: {error.strerror}") from error
    for module, params in tree.items():
        if not isinstance(module, str) or not isinstance(params, dict):
            raise UserError(f"file {str(path)!r}: {quoted(module)} is no module of parameters")
        for name, value in params.items():
            if not isinstance(name, str) or not isinstance(value, np.ndarray):
                entry = f"{quoted(name)} of {quoted(module)}"
                raise UserError(f"file {str(path)!r}: {entry} is no array")
    return tree


def check_model(config: ConfigDict) -> None:
    """Raises UserError for a config that is none of the published nets."""
    if config.model.kind not in KINDS:
        raise unknown("model of DeepMind's files:", config.model.kind, KINDS)
    check_fields(config, FIELDS, "DeepMind's NFNets")


def variant_of(tree: Mapping[str, Any]) -> str:
    """Returns the config name of the net with as many blocks: F0 has 12, and F6 7 times that."""
    blocks = {name.split("/")[2] for name in tree if name.startswith("NFNet/~/nf_block")}
    return f"nfnet_f{len(blocks) // 12 - 1}"


def variables(tree: Mapping[str, Mapping[str, Any]], config: ConfigDict) -> Tree:
    """Returns the variables of the config's model from {module name: {parameter name: array}}.

    Raises UserError as `load` does, for entries that are missing, have another shape or no place,
    or are not finite.
    """
    check_model(config)
    sizes, image_shape = config.model.stage_sizes, describe(config.data).image_shape
    listed = model_places(build(config), image_shape)
    places = {_name(path, sizes): (path, shape) for path, shape in listed}
    entries = {
        f"{module} {name}": value for module, part in tree.items() for name, value in part.items()
    }
    return placed(
        entries,
        places,
        lambda path, value: value.astype("float32"),
        lambda place: place[1],
        f"DeepMind's {config.model.kind}",
    )


def _name(path: tuple[str, ...], stage_sizes: tuple[int, ...]) -> str:
    """Returns "module parameter" for what stands at a path (collection, modules..., entry)."""
    *modules, entry = path[1:]
    names = ["NFNet"]
    for module in modules:
        block = re.fullmatch(r"stage(\d+)_block(\d+)", module)
        number = re.fullmatch(r"conv_stem(\d)", module)
        if block:
            before = sum(stage_sizes[: int(block[1]) - 1]) + int(block[2]) - 1
            names.append(f"nf_block_{before}" if before else "nf_block")
        elif number:
            names.append(f"stem_conv{int(number[1]) - 1}")
        else:
            names.append(_CONVS.get(module) or _LINEAR.get(module, module))
    if modules and modules[-1] in _LINEAR:
        entry = {"kernel": "w", "bias": "b"}[entry]
    return f"{'/~/'.join(names)} {'w' if entry == 'kernel' else entry}"


_CONVS = {
    "conv1": "conv0",
    "conv2": "conv1",
    "conv3": "conv1b",
    "conv4": "conv2",
    "conv_final": "final_conv",
}

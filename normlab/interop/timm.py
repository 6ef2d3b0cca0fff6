"""timm's `dm_nfnet_f0` to `_f6` and `nf_resnet26`, `50`, `101` in ours (timm/models/nfnet.py).

A state is what `model.state_dict()` gives, or a file of it: `.safetensors`, or a `.pth` or `.bin`
by `torch.load(weights_only=True)`, which needs PyTorch, 2.6 at least: an older one may execute what
is in the file nonetheless (CVE-2025-32434).

What is otherwise in timm, and how it is expressed (`FIELDS`, beside a choice of `nfnet_f0` and so
on, or `nf_resnet50`):

* Weight standardization adds ε = 1e-5 to the variance: `conv.epsilon_form=added`.
* dm_nfnet: GELU is the error function's form, `model.activation=gelu_erf`; the weights are
  DeepMind's, who trained with the tanh form, `gelu`, and either is taken.
* nf_resnet: padding is symmetric, shortcuts average before their convolution, and there is no skip
  gain. Its γ stands in the convolutions in place of the activations. A convolution is linear, so
  behind an activation that is the same; the stem, before any, gets γ into its gain, and the head,
  behind an activation without one, is divided by it. So `model.gain` is `released` for both.

Not converted: the nets that timm calls `nfnet_*`, `eca_nfnet_*`, `nf_seresnet*`, `nf_ecaresnet*`
and `nf_regnet_*`, which are other ones than DeepMind's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from normlab.data import describe
from normlab.errors import UserError, one_line, unknown
from normlab.interop import pytorch, safetensors
from normlab.interop.common import Place, Tree, check_fields, model_places, placed
from normlab.models import build
from normlab.models.activations import RELEASED_GAINS

_COMMON = {
    "norm.kind": "none",
    "conv.kind": "scaled_weight_standardization",
    "conv.epsilon": 1e-5,
    "conv.epsilon_form": "added",
    "conv.boundary": "zeros",
    "model.alpha": 0.2,
    "model.beta": "behind",
    "model.gain": "released",
    "model.downsample": "pool",
}
_NFNET = {
    **_COMMON,
    "model.activation": ("gelu_erf", "gelu"),
    "model.padding": "same",
    "model.second_conv": True,
}
_RESNET = {
    **_COMMON,
    "model.activation": "relu",
    "model.padding": "symmetric",
    "model.skip_gain": None,
    "model.squeeze_excite": 0.0,
}
FIELDS = {f"nfnet_f{number}": _NFNET for number in range(7)} | {
    f"nf_resnet{depth}": _RESNET for depth in (26, 50, 101)
}
"""What a config must have for timm's weights to be timm's network, by our name of the model."""


def load(path: Path, config: ConfigDict) -> Tree:
    """Returns the variables of the config's model from a file.

    Raises UserError, one line, for a file that cannot be read or is of another net, and for a
    config with which the weights are another network.
    """
    check_model(config)
    return variables(read(Path(path)), config)


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the state in a file, {name: array}; raises UserError for one that has none."""
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{str(path)!r} needs PyTorch, which is not installed; .safetensors needs nothing"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 6):
        raise UserError(
            f"{str(path)!r} needs PyTorch 2.6, and {torch.__version__} is installed, which may "
            "execute what is in the file; .safetensors needs none"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.float().numpy() for name, value in state.items()}
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever a file that is no state brings torch to
        raise UserError(
            f"{str(path)!r} is no state of a PyTorch model: {one_line(error)}"
        ) from error


def check_model(config: ConfigDict) -> None:
    """Raises UserError for a config that is none of timm's nets."""
    if config.model.kind not in FIELDS:
        raise unknown("model of timm:", config.model.kind, FIELDS)
    check_fields(config, FIELDS[config.model.kind], f"timm's {_theirs(config)}")


def variables(state: Mapping[str, Any], config: ConfigDict) -> Tree:
    """Returns the variables of the config's model from a state.

    Raises UserError as `load` does, for another number of blocks first of all.
    """
    check_model(config)
    for name in state:
        if not isinstance(name, str):
            raise UserError(f"the state has a key of type {type(name).__name__}, not a name")
    there = tuple(
        len({name.split(".")[2] for name in state if name.startswith(f"stages.{stage}.")})
        for stage in range(4)
    )
    if there != config.model.stage_sizes:
        raise UserError(
            f"the state has {there} blocks in its stages, and 'model.kind' of the config is "
            f"{config.model.kind!r}, which has {config.model.stage_sizes}"
        )
    in_convs = config.model.kind.startswith("nf_resnet")
    modules = _MODULES if in_convs else _MODULES | _SECOND_CONV
    listed = model_places(build(config), describe(config.data).image_shape)
    places = {_name(path, modules): (path, shape) for path, shape in listed}
    gamma = RELEASED_GAINS[config.model.activation]

    def ours(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
        if path[-1] == "gain":
            value = value.reshape(-1)
        elif path[-2] in _EXCITE and path[-1] == "kernel":
            value = value[:, :, 0, 0].T
        else:
            value = pytorch.laid_out(path, value)
        if in_convs and path[-2:] == ("conv_stem", "gain"):
            value = value * gamma
        elif in_convs and path[-2:] == ("head", "kernel"):
            value = value / gamma
        return value.astype("float32")

    return placed(state, places, ours, _shape, f"timm's {_theirs(config)}")


def _shape(place: Place) -> tuple[int, ...]:
    """Returns the shape that the entry for one of our variables has in a state."""
    path, shape = place
    if path[-1] == "gain":
        return (*shape, 1, 1, 1)
    if path[-2] in _EXCITE and path[-1] == "kernel":
        return (*shape[::-1], 1, 1)
    return pytorch.shape_there(place)


def _theirs(config: ConfigDict) -> str:
    """Returns timm's name of the config's model."""
    kind: str = config.model.kind
    return f"dm_{kind}" if kind.startswith("nfnet") else kind


_EXCITE = {"squeeze": "fc1", "excite": "fc2"}
_MODULES = {
    "conv_stem": "stem.conv",
    "conv_shortcut": "downsample.conv",
    "squeeze_excite": "attn_last",
    "conv_final": "final_conv",
    "head": "head.fc",
    **_EXCITE,
}
_SECOND_CONV = {"conv3": "conv2b", "conv4": "conv3"}
_ENTRIES = {"kernel": "weight", "skip_gain": "skipinit_gain"}


def _name(path: tuple[str, ...], renamed: Mapping[str, str]) -> str:
    """Returns timm's name for what stands at a path (collection, modules..., entry)."""
    *modules, entry = path[1:]
    names = []
    for module in modules:
        block = re.fullmatch(r"stage(\d+)_block(\d+)", module)
        if block:
            names.append(f"stages.{int(block[1]) - 1}.{int(block[2]) - 1}")
        else:
            names.append(renamed.get(module) or module.replace("conv_stem", "stem.conv"))
    return ".".join([*names, _ENTRIES.get(entry, entry)])

"""Configs: load a file, apply overrides, derive late, save, reload, identify.

A config is a locked `ml_collections.ConfigDict`. Three rules keep it honest:

* Nothing derived is stored. `optim.base_lr` is a field; the learning rate at a batch size is
  computed when training starts, so an override never leaves a stale value behind.
* A default is written once. `config.norm` and its like take their fields from the chosen class
  (`section`), and `configs/base.py` has the rest.
* A duration is written in exactly one of `_steps`, `_epochs`, `_examples` and `_fraction` (of the
  run); overriding one of them empties the others.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

from normlab.errors import LONGEST, UserError, nearest, unknown

SCHEMA_VERSION = 1
"""Version of the config's meaning; part of every run's identity."""

UNITS = ("steps", "epochs", "examples", "fraction")
READ_ONLY = {"norm": "norm", "model": "model", "conv": "conv", "optim": "optimizer"}
"""Sections whose `kind` is chosen after the colon, with the name of that choice."""

_NOT_IDENTITY = (
    *("log", "checkpoint", "parallel", "data.path", "probe.layers", "probe.signals"),
    *("train.microbatches", "train.remat"),
)
"""Sections and fields that change no result, only how it is computed and what is written beside."""


_DROPS = ("dropout", "block_dropout", "stochastic_depth")
"""Fields of models that make them draw at random in training."""


# Building configs (used by configs/*.py) ---------------------------------------------------------


def parse_choices(argument: str, **defaults: str) -> dict[str, str]:
    """Returns `defaults` updated by `argument`, e.g. `"model=resnet20,norm=group_norm"`.

    Raises UserError for a part that is not `key=value` and for a key not among the defaults.
    """
    choices = dict(defaults)
    for part in filter(None, (part.strip() for part in argument.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise UserError(f"choice {part!r} after the colon is not key=value")
        if key not in defaults:
            raise unknown("choice", key, defaults)
        choices[key] = value
    return choices


def section(kind: str, cls: type, leave_out: Iterable[str] = ()) -> ConfigDict:
    """Returns the config section of a class: `kind` and the class's own dataclass fields.

    Initializers, Flax's `parent` and `name`, and the fields in `leave_out` are not config. dtypes
    become strings; a field that may be None a typed placeholder; an int field `x_steps` a duration.
    """
    leave_out = {"parent", "name", *leave_out}
    hints = typing.get_type_hints(cls)
    fields: dict[str, Any] = {"kind": kind}
    for field in dataclasses.fields(cls):
        if field.name in leave_out or field.name.endswith("_init"):
            continue
        stem = field.name.removesuffix("_steps")
        if stem != field.name:
            fields |= duration(stem, steps=field.default)
        else:
            fields[field.name] = _plain(field.default, hints[field.name])
    return ConfigDict(fields)


def duration(stem: str, units: Iterable[str] = UNITS, **value: Any) -> dict[str, Any]:
    """Returns the fields `stem_steps`, `stem_epochs`, ... of a duration, at most one of them set.

    A duration's type is int (steps, examples), float (epochs, fraction) or a tuple of them, as its
    default has it.
    """
    many = any(isinstance(default, tuple) for default in value.values())
    fields: dict[str, Any] = {}
    for name in units:
        number = int if name in ("steps", "examples") else float
        kind = tuple if many else number
        default = value.get(name)
        fields[f"{stem}_{name}"] = optional(kind, None if default is None else kind(default))
    return fields


def add_duration(config: ConfigDict, name: str, units: Iterable[str] = UNITS, **value: Any) -> None:
    """Adds the fields of the duration `name`, as in `add_duration(config, "warmup", epochs=5)`.

    On a config that has them, replaces the default.
    """
    section = _parent(config, name)
    for key, field in duration(name.rpartition(".")[2], units, **value).items():
        section[key] = field


def optional(kind: type, value: Any = None) -> FieldReference:
    """Returns a field of type `kind` that may be None; `none` on the command line empties it."""
    field = config_dict.placeholder(kind)
    if value is not None:
        field.set(value)
    return field


def _plain(default: Any, hint: Any) -> Any:
    """Returns a dataclass field's default as a config value, typed by its annotation."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if default is None:
        concrete = [kind for kind in kinds if kind in (int, float, bool, str, tuple)]
        return config_dict.placeholder(concrete[0] if concrete else str)
    if types.NoneType in typing.get_args(hint):
        return optional(kinds[0], default)
    if isinstance(default, (bool, int, float, str, tuple)):
        return default
    return getattr(default, "__name__", None) or getattr(default, "name", None) or str(default)


# Loading -----------------------------------------------------------------------------------------


def load_config(source: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Loads `FILE.py[:choices]`, applies `{dotted name: value}` overrides, returns it locked.

    Values may be Python objects or strings as typed on a command line. Raises UserError, one line,
    for a missing file, an unknown choice or field, or a value of the wrong type.
    """
    config = _get_config(source)
    config.source = source
    config.lock()
    apply_overrides(config, overrides or {})
    return config


def _get_config(source: str) -> ConfigDict:
    path_text, _, argument = source.partition(":")
    path = find_config(path_text)
    spec = importlib.util.spec_from_file_location(f"normlab_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config {path_text!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Config files say `from configs import base`; both their own tree and normlab's can be meant.
    roots = [str(path.resolve().parent.parent), str(_repository())]
    sys.path[:0] = roots
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument)
    except (SyntaxError, ImportError, AttributeError) as error:
        raise UserError(f"config {path_text!r} does not load: {error}") from error
    finally:
        for root in roots:
            sys.path.remove(root)
    return config


def find_config(path_text: str) -> Path:
    """Returns the config file, looked for here and then beside the normlab package."""
    path = Path(path_text)
    if path.suffix != ".py":
        raise UserError(f"config {path_text!r} is not a .py file; e.g. configs/digits.py")
    for candidate in (path, _repository() / path):
        if candidate.is_file():
            return candidate
    folder = path.parent if path.parent.is_dir() else _repository() / "configs"
    names = [str(path.parent / file.name) for file in sorted(folder.glob("*.py"))]
    raise UserError(f"config file {path_text!r} does not exist{nearest(path_text, names)}")


def _repository() -> Path:
    return Path(__file__).resolve().parent.parent


# Overrides ---------------------------------------------------------------------------------------


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets fields of a locked config in place, each checked against the field's type."""
    for name, value in overrides.items():
        _set(config, name, value)
        for sibling in _sibling_units(config, name):
            if sibling not in overrides:
                _parent(config, sibling)[sibling.rpartition(".")[2]] = None


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the overrides of all layers; where they disagree the later one holds.

    A duration that a later layer gives in another unit replaces the earlier one.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        for name in layer:
            stem, _, unit = name.rpartition("_")
            for other in UNITS:
                if unit in UNITS and f"{stem}_{other}" not in layer:
                    found.pop(f"{stem}_{other}", None)
        found |= layer
    return found


def _set(config: ConfigDict, name: str, value: Any) -> None:
    field_names = list(flatten(config))
    if name not in field_names:
        raise unknown("config field", name, field_names)
    section_name, _, key = name.rpartition(".")
    if key == "kind" and section_name in READ_ONLY:
        choice = f"{READ_ONLY[section_name]}={value}"
        raise UserError(f"config field {name!r} is read-only; choose with ':{choice}'")
    if name == "source":
        raise UserError("config field 'source' is read-only; it names the config's own file")
    parent = _parent(config, name)
    kind, may_be_none = field_type(parent, key)
    if value is None or (isinstance(value, str) and value.lower() == "none" and may_be_none):
        if not may_be_none:
            raise UserError(f"config field {name!r} cannot be none; it is of type {kind.__name__}")
        parent[key] = None
        return
    parent[key] = _cast(name, value, kind, like=parent[key])


def _cast(name: str, value: Any, kind: type, like: Any = None) -> Any:
    """Returns `value` (perhaps text) as `kind`; never rounds, never guesses.

    The elements of a tuple are of the type of those of `like`, the present value: texts if it is
    empty, floats if there is none, as of the durations. Texts may come without quotes: `a,b`.
    """
    wrong = UserError(f"config field {name!r} takes {_article(kind)}, not {shown(value)}")
    element = kind
    if kind is tuple:
        element = float if like is None else type(like[0]) if like else str
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if isinstance(value, str):
        text = value.strip()
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if element is not str:
                raise wrong from None
            value = tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is tuple:
        parts = value if isinstance(value, (tuple, list)) else (value,)
        try:
            return tuple(_plain_value(part, element) for part in parts)
        except ValueError:
            raise UserError(
                f"config field {name!r} takes a tuple of {element.__name__}, not {shown(value)}"
            ) from None
    try:
        return _plain_value(value, kind)
    except ValueError:
        raise wrong from None


def _plain_value(value: Any, kind: type) -> Any:
    """Returns a value as `kind` if that changes nothing; raises ValueError else, and for NaN.

    And for an int that no float comes near: nothing counts so many.
    """
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError
    return value


def shown(value: Any) -> str:
    """Returns a value as it is printed, cut if it is long."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "an int of more than 308 digits"  # Python prints none of more than 4,300
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _article(kind: type) -> str:
    return {int: "an int", bool: "true or false", tuple: "a tuple, e.g. (1,2)"}.get(
        kind, f"a {kind.__name__}"
    )


def field_type(section: ConfigDict, key: str) -> tuple[type, bool]:
    """Returns (type, may it be None) of a field."""
    field = dict(section.items(preserve_field_references=True))[key]
    if isinstance(field, FieldReference):
        return field.get_type(), True
    return type(field), False


def _parent(config: ConfigDict, name: str) -> ConfigDict:
    for part in name.split(".")[:-1]:
        config = config[part]
    return config


def _sibling_units(config: ConfigDict, name: str) -> list[str]:
    """Returns the other units of the duration that `name` belongs to; [] if it is no duration."""
    match = re.fullmatch(rf"(.+)_({'|'.join(UNITS)})", name)
    if not match or field_type(_parent(config, name), name.rpartition(".")[2])[1] is False:
        return []
    siblings = [f"{match[1]}_{unit}" for unit in UNITS if unit != match[2]]
    return [sibling for sibling in siblings if sibling.rpartition(".")[2] in _parent(config, name)]


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns {dotted name: value} of all fields, sections opened."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


# Saving and identity -----------------------------------------------------------------------------


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the resolved config as plain JSON values, with the schema's version."""
    return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(config.to_dict()))}


def from_json(data: Mapping[str, Any], folder: Path | None = None) -> ConfigDict:
    """Reloads a saved config over a fresh `get_config`, so that field types survive.

    A field that came later and is no part of the identity has its default. Raises UserError if the
    config's file is gone, or has other fields now, or lies in `folder`, the run's own: it is a
    program, and a run folder, which may come from anybody, is to bring none.
    """
    values = dict(data)
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UserError(f"config.json has schema version {version}, this normlab {SCHEMA_VERSION}")
    source = values.pop("source", None)
    if not isinstance(source, str):
        raise UserError("config.json names no source file")
    path = find_config(source.partition(":")[0]).resolve()
    if folder is not None and path.is_relative_to(folder.resolve()):
        raise UserError(
            f"config.json names {source!r}, a program in the run's own folder, which is not run; "
            "move it out if you trust it"
        )
    config = _get_config(source)
    config.source = source
    config.lock()
    kinds = {f"{section}.kind" for section in READ_ONLY}
    saved = flatten(values)
    for name in kinds & saved.keys():
        if saved[name] != _parent(config, name).kind:
            raise UserError(
                f"config.json has {name} = {shown(saved[name])}, but {source!r} gives another"
            )
    missing = sorted(set(flatten(config)) - set(saved) - {"source"})
    missing = [name for name in missing if not {name, name.partition(".")[0]} & {*_NOT_IDENTITY}]
    if missing:
        raise UserError(f"config.json lacks the field {missing[0]!r} that {source!r} has now")
    for name in sorted(saved.keys() - kinds):
        _set(config, name, saved[name])
    return config


def identity(config: ConfigDict, *, stateful: bool, num_devices: int = 1) -> dict[str, Any]:
    """Returns what makes a run the run it is: its config without the fields that cannot matter.

    Left out: the file it came from, logging and what is only logged, checkpointing and device
    layout. A normalizer without state has no statistics scope; scope `device` stands for its number
    of groups.
    """
    data = to_json(config)
    del data["source"]
    for name in _NOT_IDENTITY:
        section, _, key = name.partition(".")
        if key:
            data.get(section, {}).pop(key, None)
        else:
            data.pop(section, None)
    model, parts = data["model"], config.train.microbatches
    if parts > 1 and any(model.get(name) for name in _DROPS):
        data["train"]["microbatches"] = parts  # each draws for itself
    scope = data["batch_stats"]
    if not stateful:
        scope.update(scope="global", ghost_size=None)
    elif scope["scope"] != "ghost":
        scope["ghost_size"] = None
        if scope["scope"] == "device":
            scope["groups"] = num_devices
    return data


def run_id(identity: Mapping[str, Any]) -> str:
    """Returns the first 12 hex digits of the SHA-256 of the identity's canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]

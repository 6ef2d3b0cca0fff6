"""From a config to a factory of normalizers: one model, any normalizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
from jax import Array

from normlab.norms.groups import SCOPES
from normlab.norms.normalizer import Activation, Initializer, Normalizer

FACTORY_FIELDS = (
    "stats_scope",
    "ghost_size",
    "axis_name",
    "device_groups",
    "strict",
    "activation",
)
"""Fields of normalizers that the factory sets; they are never part of `config.norm`."""

UNITS = ("steps", "epochs", "examples", "fraction")


@dataclasses.dataclass(frozen=True)
class NormFactory:
    """Makes the normalizers of a model: of one class and setting, save where an override says."""

    cls: type[Normalizer]
    fields: FrozenDict[str, Any]  # hashable, as the fields of a Flax module are
    overrides: tuple[tuple[str, "NormFactory"], ...] = ()  # (pattern of paths, what stands there)
    axis_name: str | None = None  # devices that have each a share of the batch, under pmap

    def __call__(
        self, *, name: str, scale_init: Initializer | None = None, use_bias: bool = True
    ) -> Normalizer:
        """Returns a normalizer called as `norm(x, train=..., mask=...)`.

        `scale_init`, e.g. for the last one of a residual branch, is dropped where there is no
        scale. Without `use_bias` it has no offset of its own, if it ever had: another layer does.
        """
        return self._make(name, scale_init, None, use_bias)

    def _make(
        self,
        name: str,
        scale_init: Initializer | None,
        activation: Activation | None,
        use_bias: bool = True,
    ) -> Normalizer:
        chosen = self.at(_path(name)) if self.overrides else self
        fields = dict(chosen.fields)
        if chosen.cls.replaces_activation:
            fields["activation"] = activation
        if scale_init is not None and hasattr(chosen.cls, "scale_init"):
            fields["scale_init"] = scale_init
        if not use_bias and hasattr(chosen.cls, "use_bias"):
            fields["use_bias"] = False
        return chosen.cls(**fields, name=name)

    def at(self, path: str) -> "NormFactory":
        """Returns what stands at a path, e.g. stage1_block1/norm1: the last pattern that fits."""
        fitting = [other for pattern, other in self.overrides if fnmatchcase(path, pattern)]
        return fitting[-1] if fitting else self

    def norm_act(
        self,
        *,
        name: str,
        activation: Activation,
        scale_init: Initializer | None = None,
    ) -> "Normalizer | NormAct":
        """Returns a normalizer with its activation, called as `(x, train=..., mask=...)`.

        One that replaces the activation is handed it and does both.
        """
        norm = self._make(name, scale_init, activation)
        return norm if norm.replaces_activation else NormAct(norm, activation)

    @property
    def module(self) -> Normalizer:
        """An unbound normalizer, for what does not depend on a place in a model."""
        return self.cls(**self.fields, parent=None)

    @property
    def has_bias(self) -> bool:
        """True if each normalizer has an offset that stands in for that of the layer before it."""
        own = self.cls.replaces_bias and bool(getattr(self.module, "use_bias", False))
        return own and all(other.has_bias for _, other in self.overrides)

    @property
    def measures(self) -> bool:
        """True if a normalizer measures something at each training step."""
        return bool(self.cls.measures) or any(other.measures for _, other in self.overrides)

    @property
    def stateful(self) -> bool:
        """True if a normalizer keeps running statistics."""
        return self.cls.stateful or any(other.stateful for _, other in self.overrides)


@dataclasses.dataclass(frozen=True)
class NormAct:
    """A normalizer and the activation behind it, called as the normalizer alone."""

    norm: Normalizer
    activation: Activation

    @property
    def needs_layer(self) -> bool:
        """As the normalizer's."""
        return self.norm.needs_layer

    def __call__(self, x: Array, **call: Any) -> Array:
        """Returns activation(norm(x, ...)), x [N, ..., C]."""
        return self.activation(self.norm(x, **call))


class _Place(nn.Module):
    """Nothing: a module that knows where it stands."""


def _path(name: str) -> str:
    """Returns the path of a module `name` in the module whose compact method is at work."""
    *parents, _ = _Place(name=f"{name}_place").path
    return "/".join([*parents, name])


def make_factory(
    cls: type[Normalizer],
    config: Any,
    run_length: Any,
    *,
    overrides: Sequence[tuple[str, type[Normalizer]]] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    num_devices: int = 1,
    axis_name: str | None = None,
) -> NormFactory:
    """Returns the factory for `config.norm` (kind and fields) and `config.batch_stats` (scope).

    `overrides`: (pattern, class) of the normalizers that differ, with the fields' class defaults,
    save for those that `defaults`, the model's own, has, and for durations, which are the class's
    fractions of the run.
    `run_length.steps(section, stem, section_name)` turns a duration into steps. Raises ValueError,
    one line, for a scope that does not exist or a ghost size that does not divide
    `config.train.batch_size`.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    fields = {}
    for key in config.norm:
        stem, _, unit = key.rpartition("_")
        if key in names and unit not in UNITS:
            fields[key] = config.norm[key]
        elif unit in UNITS:
            fields[f"{stem}_steps"] = run_length.steps(config.norm, stem, "norm")
    for key, value in fields.items():
        if key.endswith("_steps") and value is None:
            raise ValueError(f"config field 'norm.{key}' is empty; give it in one of its units")

    def present(cls: type[Normalizer]) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(cls)}
        parts = cls.fractions.items()
        durations = {f"{stem}_steps": round(part * run_length.num_steps) for stem, part in parts}
        return durations | {name: value for name, value in defaults.items() if name in names}

    def factory(cls: type[Normalizer], fields: dict[str, Any]) -> NormFactory:
        names = {field.name for field in dataclasses.fields(cls)}
        settled: dict[str, Any] = {"strict": False} if "strict" in names else {}
        if "stats_scope" in names:
            settled |= _scope_fields(config, num_devices, axis_name)
        elif "axis_name" in names:
            settled |= {"axis_name": axis_name}
        return NormFactory(cls, FrozenDict(fields | settled), axis_name=axis_name)

    others = tuple((pattern, factory(other, present(other))) for pattern, other in overrides)
    return dataclasses.replace(factory(cls, fields), overrides=others)


def _scope_fields(config: Any, num_devices: int, axis_name: str | None) -> dict[str, Any]:
    scope, ghost_size = config.batch_stats.scope, config.batch_stats.ghost_size
    batch_size = config.train.batch_size
    if scope not in SCOPES:
        raise ValueError(f"config field 'batch_stats.scope' = {scope!r} is none of {SCOPES}")
    if scope == "ghost":
        if ghost_size is None:
            raise ValueError(
                "config field 'batch_stats.ghost_size' is empty; scope 'ghost' needs it"
            )
        if ghost_size < 1 or batch_size % ghost_size:
            legal = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
            nearest = min(legal, key=lambda size: abs(size - ghost_size))
            raise ValueError(
                f"config field 'batch_stats.ghost_size' = {ghost_size} does not divide the batch "
                f"of {batch_size}; nearest: {nearest}"
            )
    # Under jit all shares of the batch are in one array; under pmap each device sees its own.
    groups = num_devices if scope == "device" and axis_name is None else 1
    return {
        "stats_scope": scope,
        "ghost_size": ghost_size if scope == "ghost" else None,
        "axis_name": axis_name,
        "device_groups": groups,
    }

"""What a sweep varies: grids of config fields that multiply and add."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from normlab.errors import UserError


@dataclass(frozen=True)
class Point:
    """One combination. A field without a dot is a choice after the config's colon."""

    fields: Mapping[str, Any] = field(default_factory=dict)  # everything that is set here
    names: tuple[str, ...] = ()  # of the setting, part by part
    swept: Mapping[str, Any] = field(default_factory=dict)  # what a grid varies, the norm apart
    tuned: Mapping[str, Any] = field(default_factory=dict)  # what is chosen on validation data

    @property
    def setting(self) -> str:
        """The heading in a table under which this point stands, e.g. `ghost_size=32`."""
        return ", ".join(self.names) or "base"

    @property
    def choices(self) -> dict[str, str]:
        """Returns what goes after the config's colon."""
        return {name: str(value) for name, value in self.fields.items() if "." not in name}

    @property
    def overrides(self) -> dict[str, Any]:
        """Returns the fields that override the config's."""
        return {name: value for name, value in self.fields.items() if "." in name}

    def __mul__(self, other: "Point") -> "Point":
        twice = self.fields.keys() & other.fields.keys()
        if twice:
            raise UserError(f"a grid sets {min(twice)!r} twice")
        return Point(
            {**self.fields, **other.fields},
            self.names + other.names,
            {**self.swept, **other.swept},
            {**self.tuned, **other.tuned},
        )


@dataclass(frozen=True)
class Grid:
    """Points in order. `a * b`: every point of a with every one of b; `a + b`: both, one by one."""

    points: tuple[Point, ...]

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __mul__(self, other: "Grid") -> "Grid":
        return Grid(tuple(a * b for a, b in itertools.product(self.points, other.points)))

    def __add__(self, other: "Grid") -> "Grid":
        return Grid(self.points + other.points)


def grid(axes: Mapping[str, Iterable[Any]], fixed: Mapping[str, Any] | None = None) -> Grid:
    """Returns all combinations of the axes' values, with the `fixed` fields in each.

    The first axis varies slowest. Each value of an axis but `norm` names a setting, as in
    `ghost_size=32`. Raises UserError for an axis without values.
    """
    product = Grid((Point(dict(fixed or {})),))
    for name, values in axes.items():
        product *= _axis(name, values, named=True)
    return product


def tune(axes: Mapping[str, Iterable[Any]]) -> Grid:
    """Returns all combinations of values of which the report takes each normalizer's best.

    Best is the highest mean validation accuracy over seeds, so the config needs
    `data.num_validation`.
    """
    product = Grid((Point(),))
    for name, values in axes.items():
        product *= _axis(name, values, named=False)
    return product


def settings(named: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Returns one point for each name, which sets its fields."""
    return Grid(tuple(Point(dict(fields), (name,)) for name, fields in named.items()))


def _axis(name: str, values: Iterable[Any], *, named: bool) -> Grid:
    values = tuple(values)
    if not values:
        raise UserError(f"a grid gives {name!r} no value")
    if len(set(map(str, values))) < len(values):
        raise UserError(f"a grid gives {name!r} the same value twice")

    def point(value: Any) -> Point:
        if name == "norm":
            return Point({name: value})
        if not named:
            return Point({name: value}, tuned={name: value})
        return Point({name: value}, (f"{name.rpartition('.')[2]}={value}",), {name: value})

    return Grid(tuple(point(value) for value in values))

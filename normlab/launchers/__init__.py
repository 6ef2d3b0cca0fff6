"""Where the runs of a plan are computed: processes of this machine, SLURM, Kubernetes.

A launcher decides nothing about a run: what is done is skipped, what was cut off goes on, what
failed is tried again, and the run folder alone says which is which. So the command that started a
sweep may be killed and typed again, with the same launcher or another.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from normlab.errors import UserError, unknown
from normlab.launchers.kubernetes import Kubernetes
from normlab.launchers.launcher import Launcher, Rendered
from normlab.launchers.local import Local
from normlab.launchers.slurm import Slurm

LAUNCHERS: Mapping[str, type[Any]] = {"local": Local, "slurm": Slurm, "kubernetes": Kubernetes}
"""Each is a dataclass: its fields are the launcher's options, and it is a `Launcher`."""

__all__ = ["LAUNCHERS", "Launcher", "Rendered", "parse"]


def parse(text: str) -> Launcher:
    """Returns the launcher of `NAME` or `NAME:option=value,option=value`. Raises UserError."""
    name, _, rest = text.partition(":")
    if name not in LAUNCHERS:
        raise unknown("launcher", name, LAUNCHERS)
    kind = LAUNCHERS[name]
    hints = typing.get_type_hints(kind)
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--launcher={text!r}: {part!r} is not option=value")
        if option not in hints:
            raise unknown(f"option of the launcher {name!r}:", option, hints)
        if option in options:
            raise UserError(f"--launcher={text!r} gives {option!r} twice")
        options[option] = _value(option, value, hints[option])
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in options
    ]
    if missing:
        raise UserError(f"the launcher {name!r} needs {missing[0]}=...; see docs/launching.md")
    return kind(**options)


_MEANING = {int: "a whole number of 0 or more", float: "a number above 0"}


def _value(option: str, text: str, hint: Any) -> Any:
    """Returns an option's value as its field has it."""
    union = isinstance(hint, types.UnionType)
    kind = next(part for part in typing.get_args(hint) if part is not type(None)) if union else hint
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or value == "" or (kind is int and value < 0):
        wrong = True
    else:
        wrong = kind is float and not 0 < value < float("inf")
    if wrong:
        raise UserError(f"launcher: {option}={text!r} is not {_MEANING.get(kind, 'a name')}")
    return value

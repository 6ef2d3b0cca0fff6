"""What the fields of a config mean: read from the comments beside their definitions."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from normlab.config import UNITS, find_config, flatten
from normlab.models import CONVS, MODELS
from normlab.norms import NORMS
from normlab.optim import OPTIMIZERS


def meanings(source: Any) -> dict[str, str]:
    """Returns {field name: meaning} from the comments that trail fields in source code.

    `source` is text, or a module or class whose source is read. A field is `config.a.b = 1  # why`,
    `add_duration(config, "a.b", ...)  # why` or, in a class, `name: int = 1  # why`.
    """
    text = source if isinstance(source, str) else inspect.getsource(source)
    patterns = (
        r"^\s*config\.([\w.]+) = .*?  # (.+)$",
        r"^\s*add_duration\(config, \"([\w.]+)\".*\)  # (.+)$",
        r"^    (\w+): .*?  # (.+)$",
    )
    return {
        name: meaning.strip()
        for pattern in patterns
        for name, meaning in re.findall(pattern, text, flags=re.MULTILINE)
    }


def field_meanings(config: Any) -> dict[str, str]:
    """Returns {dotted name: meaning} from the comments beside the fields' definitions."""
    base = find_config("configs/base.py")  # where the common fields are
    found = meanings(base.read_text(encoding="utf-8"))
    registries: dict[str, Mapping[str, Any]] = {
        "norm": NORMS,
        "model": MODELS,
        "conv": CONVS,
        "optim": OPTIMIZERS,
    }
    for section, registry in registries.items():
        found[f"{section}.kind"] = "chosen after the colon (read-only)"
        for cls in reversed(registry[config[section].kind].__mro__):
            if cls.__module__.startswith("normlab."):
                fields = meanings(cls)
                found |= {f"{section}.{name}": text for name, text in fields.items()}
    for name in flatten(config):
        stem, _, unit = name.rpartition("_")
        if unit in UNITS and name not in found:
            text = found.get(stem) or found.get(f"{stem}_steps", "")
            found[name] = f"{text} [{unit}]" if text else ""
        elif unit in UNITS and f"{stem}_epochs" in flatten(config):
            found[name] = f"{found[name]} [{unit}]"
    return found

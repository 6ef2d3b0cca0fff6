"""The safetensors format: a length (8 bytes, little-endian), a JSON header, and the numbers.

The header has {name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}}, offsets
counted from the header's end, and perhaps `__metadata__`, texts (huggingface/safetensors, its
README). Nothing in it can be executed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from normlab.errors import UserError, one_line, unknown

DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""Kinds of numbers that are read, as numpy names them."""

_MAX_HEADER = 100_000_000


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns {name: array} of a file. Raises UserError, one line, for one that is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    try:
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 or length > min(_MAX_HEADER, len(content) - 8):
            raise ValueError("its header is cut off")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        data = memoryview(content)[8 + length :]
        return {name: _array(name, entry, data) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is no safetensors file: {one_line(error)}") from error


def _array(name: str, entry: dict[str, Any], data: memoryview) -> np.ndarray:
    kind = str(entry["dtype"])
    if kind not in DTYPES:
        raise unknown(f"kind of numbers of {name!r}:", kind, DTYPES)
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"{name!r} lies outside of the file")
    return np.frombuffer(data[begin:end], DTYPES[kind]).reshape(entry["shape"])

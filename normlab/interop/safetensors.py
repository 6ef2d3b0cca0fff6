"""The safetensors format: a length (8 bytes, little-endian), a JSON header, and the numbers.

The header has {name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}}, offsets
counted from the header's end, and perhaps `__metadata__`, texts. The numbers have no gaps, and no
tensors overlap (huggingface/safetensors, its README). Nothing in it can be executed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from normlab.errors import UserError, one_line, quoted, unknown

DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""Kinds of numbers that are read, as numpy names them."""

_MAX_HEADER = 100_000_000

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading an ill-made header may raise."""


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
        arrays = {name: _array(name, entry, data) for name, entry in header.items()}
        _check_cover([entry["data_offsets"] for entry in header.values()], len(data))
        return arrays
    except _DAMAGED as error:
        raise UserError(f"{str(path)!r} is no safetensors file: {one_line(error)}") from error


def _array(name: str, entry: dict[str, Any], data: memoryview) -> np.ndarray:
    kind, shape, named = str(entry["dtype"]), entry["shape"], quoted(name)
    if kind not in DTYPES:
        raise unknown(f"kind of numbers of {named}:", kind, DTYPES)
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"{named} lies outside of the file")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{named} has shape {json.dumps(shape)}, not a list of sizes")
    return np.frombuffer(data[begin:end], DTYPES[kind]).reshape(shape)


def _check_cover(offsets: list[tuple[int, int]], length: int) -> None:
    """Raises ValueError unless the tensors follow each other from the first byte to the last."""
    reached = 0
    for begin, end in sorted(offsets):
        if begin != reached:
            raise ValueError(f"its tensors {'overlap' if begin < reached else 'leave a gap'}")
        reached = end
    if reached != length:
        raise ValueError("its tensors leave a gap")

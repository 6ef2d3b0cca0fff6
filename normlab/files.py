"""Files, written whole or not at all and read within bounds: a run folder may come from anybody."""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from normlab.errors import UserError, one_line


def write_json(path: Path, data: Any) -> None:
    """Writes JSON so that the file is at any moment the old one or the whole new one."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: to a neighbour first, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns a JSON object; None if the file is absent.

    Raises UserError if it is not a JSON object, or no file of a size that such objects have.
    """
    try:
        data = json.loads(read_small(path).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object")
    return data


LARGEST_JSON = 64 * 2**20
"""Bytes: a plan of 100,000 runs has 20 million."""

BLOCK = 2**22
"""Bytes of a log that are read at a time."""

LONGEST_LINE = 2**20
"""Bytes of a line of a log that need not be read in one block: some 20,000 numbers with names."""


def _open(path: Path) -> IO[bytes]:
    """Opens a file to read; raises OSError for what might never end: a pipe, a device."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.open("rb")


def read_small(path: Path) -> bytes:
    """Returns a file's bytes; raises OSError, or ValueError if they are over `LARGEST_JSON`."""
    with _open(path) as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
    return content


def blocks_of(path: Path) -> Iterator[list[bytes]]:
    """Yields a file's lines, some at a time, as it need not fit into the memory; raises OSError.

    What follows the last end of a line, perhaps nothing, comes last, by itself. A line that is too
    long is replaced by one that is not JSON.
    """
    rest = b""
    with _open(path) as file:
        while block := file.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            if lines:
                yield lines
            if len(rest) > LONGEST_LINE:
                rest = b"\0"  # and what follows of it
    yield [rest]


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON line; a number that is not finite becomes null."""
    clean = {key: finite_or_none(value) for key, value in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, allow_nan=False) + "\n")


def finite_or_none(value: Any) -> Any:
    """Returns None for a float that JSON cannot write, any other value as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def free_name(path: Path) -> Path:
    """Returns `path` with the first number behind it, `-1`, `-2`, ..., that nothing bears yet."""
    number = 1
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate

"""The two ways a command ends badly: the user's mistake and the machine's fault.

Both are one line: they name the thing, its value, and the nearest right one.
"""

import difflib
from collections.abc import Iterable

LONGEST = 100
"""Characters of a name that are printed."""


class UserError(Exception):
    """A mistake in a config or a command: one line on stderr, exit code 2."""

    exit_code = 2


class MachineFault(Exception):
    """A fault of the machine (disk full, folder not writable): one line on stderr, exit code 1."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """Returns the first line of what an error of a library says, or else its kind.

    It may cite a file: the line is `printable`, and cut if it is a long one.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return printable(line[: 2 * LONGEST]) + ("..." if len(line) > 2 * LONGEST else "")


def printable(text: str) -> str:
    """Returns a text as one line that any terminal and file takes.

    Line breaks, control characters and the bytes of a name that are no UTF-8 are escaped.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quoted(name: str | bytes) -> str:
    """Returns a name out of a file as it is printed: in quotes, escaped, cut if it is long."""
    return f"{name[:LONGEST]!r}..." if len(name) > LONGEST else repr(name)


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the option closest to `name`, else `; one of a, b, c`."""
    options = list(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; one of {', '.join(options)}" if 0 < len(options) <= 20 else ""


def unknown(what: str, name: str, options: Iterable[str]) -> UserError:
    """Returns the error for a name that is in no list, e.g. `unknown norm 'bach_norm'; did ...`."""
    return UserError(f"unknown {what} {quoted(name)}{nearest(name[:LONGEST], options)}")

"""Dicts of arrays out of a pickle, and nothing else.

A pickle is a program: `pickle.load` runs whatever its author wrote. Here stand-ins of ours take the
place of all that a numpy array wants, and nothing else is admitted: numpy's own constructors would
take lengths and types from the file on trust.

dill writes arrays in a form of its own, `_create_array(function, arguments, state)`, and older ones
write a function as `_get_attr(_import_module("numpy.core._multiarray_umath"), "_reconstruct")`.
Both are read, without dill.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from normlab.errors import UserError

Admitted = dict[tuple[str, str], Any]


def load_arrays(content: bytes, label: str, kinds: Collection[str]) -> dict[Any, Any]:
    """Returns the dict in a pickle of arrays and plain containers.

    `kinds` of numbers are numpy's: u1 for uint8. Arrays are not to be written to. Strings of Python
    2 become bytes. Raises UserError, with the file's `label`, for a pickle that is cut off, or that
    wants anything else, which is then not called.
    """
    try:
        _check_memo(content)
        found = _SafeUnpickler(content, kinds).load()
        if isinstance(found, dict):
            return _arrays_in(found)
    except Exception as error:  # damaged or hostile bytes may raise anything
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"file {label!r} ({len(content):,} bytes) is no pickle of arrays: {reason}"
        ) from error
    raise UserError(f"file {label!r} is a pickled {type(found).__name__}, not a dict")


def _check_memo(content: bytes) -> None:
    """Raises UnpicklingError for a memo index past the number of opcodes before it.

    Picklers count memo entries up. The unpickler clears a table of twice the index, whatever the
    size of the file: gigabytes for nine bytes.
    """
    for ordinal, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > ordinal:
            raise pickle.UnpicklingError(f"it has memo index {argument} at opcode {ordinal}")


class _SafeUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes, kinds: Collection[str]) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._stand_ins = _stand_ins(kinds, self.find_class)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return self._stand_ins[module, name]


class _Array:
    """What the file says of an array, until it is checked."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, content = state
        flat = np.frombuffer(content, dtype.value)
        self.array = flat.reshape(shape, order="F" if column_major else "C")


class _DType:
    def __init__(self, code: Any, kinds: Collection[str]) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if text not in kinds:
            names = ", ".join(np.dtype(kind).name for kind in kinds)
            raise pickle.UnpicklingError(f"it has an array of {text!r}, not of {names}")
        self.value = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order: Any = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        self.value = self.value.newbyteorder(order)


def _stand_ins(kinds: Collection[str], find: Callable[[str, str], Any]) -> Admitted:
    """Returns what the names in a pickle stand for; anew for each file, which could alter them."""

    def reconstruct(*_: Any) -> _Array:
        """Ignores the arguments: the array's class and a first shape."""
        return _Array()

    def dtype(code: Any, *_: Any) -> _DType:
        return _DType(code, kinds)

    def scalar(dtype: _DType, content: bytes) -> np.ndarray:
        return np.frombuffer(content, dtype.value).reshape(())

    def from_buffer(content: Any, dtype: _DType, shape: Any, order: str) -> np.ndarray:
        return np.frombuffer(content, dtype.value).reshape(
            shape, order="F" if order == "F" else "C"
        )

    def encode(text: str, encoding: str) -> bytes:
        """By which Python 3 writes bytes in an old protocol."""
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"it has text in encoding {encoding!r}")
        return text.encode("latin1")

    def create_array(make: Any, arguments: Any, state: Any, extra: Any = None) -> _Array:
        array = _Array()
        array.__setstate__(state)
        return array

    def import_module(name: str, safe: bool = False) -> str:
        return name

    def get_attr(module: str, name: str) -> Any:
        return find(module, name)

    cores = ("numpy.core", "numpy._core")
    homes = [f"{core}.{module}" for core in cores for module in ("multiarray", "_multiarray_umath")]
    return {
        **{(home, "_reconstruct"): reconstruct for home in homes},
        **{(home, "scalar"): scalar for home in homes},
        ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
        ("numpy", "dtype"): dtype,
        **{(f"{core}.numeric", "_frombuffer"): from_buffer for core in cores},
        ("_codecs", "encode"): encode,
        ("dill._dill", "_create_array"): create_array,
        ("dill._dill", "_import_module"): import_module,
        ("dill._dill", "_get_attr"): get_attr,
    }


def _arrays_in(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _arrays_in(value) for key, value in found.items()}
    return found.array if isinstance(found, _Array) else found

"""Dicts of arrays out of a pickle, and nothing else.

A pickle is a program: `pickle.load` runs whatever its author wrote. Here stand-ins of ours take the
place of all that a numpy array wants, and nothing else is admitted: numpy's own constructors would
take lengths and types from the file on trust. Nor does any type go without saying: what the file
gives is not hashed, compared or printed before it is known to be text.

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

from normlab.errors import UserError, one_line

Admitted = dict[tuple[str, str], Any]


def load_arrays(content: bytes, label: str, kinds: Collection[str]) -> dict[Any, Any]:
    """Returns the dict in a pickle of arrays and plain containers.

    `kinds` of numbers are numpy's: u1 for uint8. Arrays are not to be written to. Strings of Python
    2 become bytes. Keys are text or bytes, and no container stands in two places. Raises UserError,
    with the file's `label`, for a pickle that is cut off, or that wants anything else, which is
    then not called.
    """
    try:
        _check_program(content)
        found = _SafeUnpickler(content, kinds).load()
        if isinstance(found, dict):
            return _arrays_in(found, set())
    except Exception as error:  # damaged or hostile bytes may raise anything
        raise UserError(
            f"file {label!r} ({len(content):,} bytes) is no pickle of arrays: {one_line(error)}"
        ) from error
    raise UserError(f"file {label!r} is a pickled {type(found).__name__}, not a dict")


_MAY_BE_KEYS = (
    pickletools.pyunicode,
    pickletools.pystring,
    pickletools.pybytes,
    pickletools.pybytes_or_str,
    pickletools.anyobject,  # what a stand-in returns: `encode` returns bytes
)


def _check_program(content: bytes) -> None:
    """Raises UnpicklingError for what would end, or never end, in the unpickler itself.

    A memo index past the number of opcodes before it: picklers count memo entries up, and the
    unpickler clears a table of twice the index, gigabytes for nine bytes.

    A key that is no text, and a set: they are hashed while the file is being read. The hash of a
    tuple in tuples recurses without a limit, and takes 2ⁿ steps if each of n is twice in the next.
    So the stack is followed here, as `pickletools.dis` does, by the types of what stands on it.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for ordinal, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name, before, after = opcode.name, opcode.stack_before, opcode.stack_after
        if name == "MARK":
            marks.append(len(stack))
            continue
        if name == "POP" and marks[-1:] == [len(stack)]:
            marks.pop()
            continue
        if pickletools.markobject in before:
            first = marks.pop() if marks else 0
            above, wanted = stack[first:], before.index(pickletools.markobject)
            del stack[first:]
        else:
            above, wanted = stack[-2:], len(before)

        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if (argument or 0) > ordinal:
                raise pickle.UnpicklingError(f"it has memo index {argument} at opcode {ordinal}")
            memo[argument] = stack[-1:]
        elif name == "MEMOIZE":
            memo[len(memo)] = after = stack[-1:]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            after = memo.get(argument, [])
        elif name == "DUP":
            after = 2 * stack[-1:]
        elif name == "BUILD":  # of a tuple it may leave a tuple
            after = stack[-2:-1]
        elif name in ("EMPTY_SET", "ADDITEMS", "FROZENSET"):
            raise pickle.UnpicklingError(f"it has a set at opcode {ordinal}")
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            for key in above[::2]:
                if key not in _MAY_BE_KEYS:
                    raise pickle.UnpicklingError(f"it has a key of type {key.name}, not text")
        # A stack that lacks what an opcode wants ends the unpickler, too: nothing follows it.
        del stack[max(len(stack) - wanted, 0) :]
        stack.extend(after)


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

    def __init__(self, array: np.ndarray | None = None) -> None:
        self.array = array

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, content = state
        self.array = _numbers(content, dtype, shape, column_major)


class _DType:
    def __init__(self, code: Any, kinds: Collection[str]) -> None:
        text = _text(code)
        if text not in kinds:
            names = ", ".join(np.dtype(kind).name for kind in kinds)
            raise pickle.UnpicklingError(f"it has an array of {text!r}, not of {names}")
        self.value = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order: Any = _text(state[1])
        self.value = self.value.newbyteorder(order)


class _StandIn:
    """A function that a pickle can call and, unlike a function, set no attribute of."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name!r} of a function")


def _text(found: Any) -> str:
    """Returns text as text; strings of Python 2 were read as bytes."""
    if isinstance(found, bytes):
        return found.decode("latin1")
    if not isinstance(found, str):
        raise pickle.UnpicklingError(f"it has a value of type {type(found).__name__}, not text")
    return found


def _numbers(content: Any, dtype: Any, shape: Any, column_major: Any) -> np.ndarray:
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError(f"it has an array of type {type(dtype).__name__}, no dtype")
    flat = np.frombuffer(content, dtype.value)
    return flat.reshape(shape, order="F" if column_major else "C")


def _stand_ins(kinds: Collection[str], find: Callable[[str, str], Any]) -> Admitted:
    """Returns what the names in a pickle stand for."""

    def reconstruct(*_: Any) -> _Array:
        """Ignores the arguments: the array's class and a first shape."""
        return _Array()

    def dtype(code: Any, *_: Any) -> _DType:
        return _DType(code, kinds)

    def scalar(dtype: Any, content: Any) -> _Array:
        return _Array(_numbers(content, dtype, (), False))

    def from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        return _Array(_numbers(content, dtype, shape, _text(order) == "F"))

    def encode(text: Any, encoding: Any) -> bytes:
        """By which Python 3 writes bytes in an old protocol."""
        if _text(encoding) != "latin1":
            raise pickle.UnpicklingError(f"it has text in encoding {encoding!r}")
        return _text(text).encode("latin1")

    def create_array(make: Any, arguments: Any, state: Any, extra: Any = None) -> _Array:
        array = _Array()
        array.__setstate__(state)
        return array

    def import_module(name: Any, safe: Any = False) -> str:
        return _text(name)

    def get_attr(module: Any, name: Any) -> Any:
        return find(_text(module), _text(name))

    cores = ("numpy.core", "numpy._core")
    homes = [f"{core}.{module}" for core in cores for module in ("multiarray", "_multiarray_umath")]
    functions: dict[tuple[str, str], Callable[..., Any]] = {
        **{(home, "_reconstruct"): reconstruct for home in homes},
        **{(home, "scalar"): scalar for home in homes},
        ("numpy", "dtype"): dtype,
        **{(f"{core}.numeric", "_frombuffer"): from_buffer for core in cores},
        ("_codecs", "encode"): encode,
        ("dill._dill", "_create_array"): create_array,
        ("dill._dill", "_import_module"): import_module,
        ("dill._dill", "_get_attr"): get_attr,
    }
    return {
        **{name: _StandIn(function) for name, function in functions.items()},
        ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
    }


def _arrays_in(found: Any, seen: set[int]) -> Any:
    """Returns what was found with arrays in place of `_Array`, `seen` being the ids of containers.

    Raises UnpicklingError for what is neither array, number, text nor container, and for a
    container in two places: n dicts, each twice in the next, would be read 2ⁿ times.
    """
    if isinstance(found, _Array) and found.array is not None:
        return found.array
    if isinstance(found, str | bytes | int | float):
        return found
    if not isinstance(found, dict | list | tuple):
        raise pickle.UnpicklingError(f"it has a value of type {type(found).__name__}")
    if found and id(found) in seen:  # of () there is only one
        raise pickle.UnpicklingError(f"it has a {type(found).__name__} in two places")
    seen.add(id(found))
    if not isinstance(found, dict):
        return type(found)(_arrays_in(value, seen) for value in found)
    for key in found:
        if not isinstance(key, str | bytes):
            raise pickle.UnpicklingError(f"it has a key of type {type(key).__name__}, not text")
    return {key: _arrays_in(value, seen) for key, value in found.items()}

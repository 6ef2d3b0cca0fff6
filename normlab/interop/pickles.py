"""Nested dicts of arrays out of a pickle, and nothing else.

A pickle is a program: `pickle.load` runs whatever its author wrote. Here a name in it stands for
one of the few functions below, which are this module's own and make arrays of floats, or the file
is refused. So no function of numpy, dill or any other package is called by the file.

dill writes arrays in forms of its own: `_create_array(function, arguments, state)`, and functions
as `_get_attr(_import_module("numpy.core..."), "_reconstruct")`. Both are read.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from normlab.errors import UserError, one_line

FLOATS = ("f2", "f4", "f8")
"""Kinds of numbers that are read: float16, float32, float64."""

_RECONSTRUCT_HOMES = tuple(
    f"numpy.{core}.{module}"
    for core in ("core", "_core")
    for module in ("multiarray", "_multiarray_umath")
)
_BUFFER_HOMES = ("numpy.core.numeric", "numpy._core.numeric")


def read_arrays(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns {module: {parameter: array}} of a file, arrays of floats, not to be written to.

    Raises UserError, one line, for a file that holds anything else, or is cut off.
    """
    try:
        with path.open("rb") as file:
            tree = _Reader(file, path).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except Exception as error:  # a pickle that is none can fail at any place of its reader
        raise UserError(f"{str(path)!r} is no pickle of arrays: {one_line(error)}") from error
    return _checked(tree, path)


def _checked(tree: Any, path: Path) -> dict[str, dict[str, np.ndarray]]:
    if not isinstance(tree, Mapping) or not tree:
        raise UserError(f"{str(path)!r} holds no dict of modules, but {type(tree).__name__}")
    found: dict[str, dict[str, np.ndarray]] = {}
    for module, params in tree.items():
        if not isinstance(module, str) or not isinstance(params, Mapping):
            raise UserError(f"{str(path)!r}: {module!r} is no module with its parameters")
        found[module] = {}
        for name, value in params.items():
            array = value.value if isinstance(value, _Array) else value
            if not isinstance(name, str) or not isinstance(array, np.ndarray):
                raise UserError(f"{str(path)!r}: {name!r} of {module!r} is no array")
            found[module][name] = array
    return found


class _Array:
    """An array whose contents come later, as pickles have it."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        values = np.frombuffer(raw, dtype.value)
        self.value = values.reshape(shape, order="F" if is_fortran else "C")


class _DType:
    """A kind of number, whose byte order comes later."""

    def __init__(self, code: str) -> None:
        if code not in FLOATS:
            raise ValueError(f"numbers of kind {code!r}, not one of {', '.join(FLOATS)}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path, self._admitted = path, _admitted(self.find_class)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise UserError(
                f"{str(self._path)!r} asks for {module}.{name}; only dicts and numpy's arrays of "
                "floats are read"
            )
        return self._admitted[module, name]


def _admitted(find: Callable[[str, str], Any]) -> dict[tuple[str, str], Any]:
    """Returns what the names of a pickle stand for; made anew for each file, which might alter it.

    `find` gives the same by module and name.
    """

    def dtype(code: str, *_: Any) -> _DType:
        return _DType(code)

    def reconstruct(*_: Any) -> _Array:
        return _Array()

    def scalar(dtype: _DType, raw: bytes) -> np.ndarray:
        return np.frombuffer(raw, dtype.value).reshape(())

    def from_buffer(raw: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
        return np.frombuffer(raw, dtype.value).reshape(shape, order="F" if order == "F" else "C")

    def create_array(make: Any, arguments: Any, state: Any, extra: Any = None) -> _Array:
        array = reconstruct()
        array.__setstate__(state)
        return array

    def import_module(name: str, safe: bool = False) -> str:
        return name

    return {
        **{(home, "_reconstruct"): reconstruct for home in _RECONSTRUCT_HOMES},
        **{(home, "scalar"): scalar for home in _RECONSTRUCT_HOMES},
        **{(home, "_frombuffer"): from_buffer for home in _BUFFER_HOMES},
        ("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct, which takes none here
        ("numpy", "dtype"): dtype,
        ("dill._dill", "_create_array"): create_array,
        ("dill._dill", "_import_module"): import_module,
        ("dill._dill", "_get_attr"): find,
    }

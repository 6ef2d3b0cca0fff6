"""Pickles: arrays and plain containers, and nothing else."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from official import INFOS, python2_pickle

from normlab.data.decode import CIFAR_PYTHON, File
from normlab.data.pickles import load_arrays
from normlab.errors import UserError

KINDS = ("u1",)
PIXELS = np.arange(48, dtype=np.uint8).reshape(2, 24)


def refusal(content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        load_arrays(content, "data_batch_1", KINDS)
    message = str(caught.value)
    assert message.startswith("file 'data_batch_1' ")
    assert "\n" not in message
    return message


def test_a_pickle_of_python_2_is_read() -> None:
    batch = load_arrays(python2_pickle({"data": PIXELS, "labels": [3, 4]}), "f", KINDS)
    np.testing.assert_array_equal(batch[b"data"], PIXELS)
    assert batch[b"labels"] == [3, 4]


def test_the_python_2_pickle_of_these_tests_is_one_that_numpy_reads() -> None:
    loaded = pickle.loads(python2_pickle({"data": PIXELS}), encoding="latin1")
    np.testing.assert_array_equal(loaded["data"], PIXELS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_pickle_of_python_3_is_read(protocol: int, order: str) -> None:
    data = np.asarray(PIXELS, order=order)  # type: ignore[call-overload]
    batch = load_arrays(pickle.dumps({"data": data, "labels": [3, 4]}, protocol), "f", KINDS)
    np.testing.assert_array_equal(batch["data"], PIXELS)


class Call:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    hostile = pickle.dumps({"data": Call(Path.touch, trace), "labels": []})
    pickle.loads(hostile)
    assert trace.exists()  # it does harm where anything is admitted
    trace.unlink()
    assert "is no pickle of arrays: it wants " in refusal(hostile)
    assert not trace.exists()


@pytest.mark.parametrize(
    "function",
    [eval, exec, open, getattr, __import__, np.load, np.fromfile, pickle.loads],
    ids=lambda function: function.__name__,
)
def test_no_function_is_admitted(function: Any) -> None:
    assert "it wants " in refusal(pickle.dumps(Call(function, "x")))


@pytest.mark.parametrize(
    "array",
    [np.arange(3.0), np.array([print, 1], object), np.zeros(2, [("a", "u1")])],
    ids=["float", "object", "structured"],
)
def test_only_bytes_are_admitted_as_arrays(array: np.ndarray) -> None:
    assert "it " in refusal(pickle.dumps({"data": array}, 4))


def test_an_array_that_claims_more_than_it_brings_allocates_nothing() -> None:
    content = python2_pickle({"data": PIXELS})
    claimed = content.replace(b"J\x02\x00\x00\x00", b"J\xff\xff\xff\x7f")  # 2³¹ − 1 rows
    assert "cannot reshape array of size 48" in refusal(claimed)
    wanted = b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR."  # numpy.ndarray(2³¹ − 1)
    assert "not callable" in refusal(wanted)


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x01", b"p33554431\n"], ids=["LONG_BINPUT", "PUT"])
def test_a_memo_index_that_claims_a_large_table_is_refused(put: bytes) -> None:
    # Index 2²⁵ − 1 makes the unpickler clear 2²⁶ pointers, 512 MiB; PROTO and EMPTY_DICT precede.
    assert "it has memo index 33554431 at opcode 2" in refusal(b"\x80\x02}" + put + b".")


@pytest.mark.parametrize("encoding", ["zlib", "rot13"])
def test_no_codec_but_latin1_is_admitted(encoding: str) -> None:
    content = b"\x80\x02c_codecs\nencode\n(X\x01\0\0\0aX" + bytes([len(encoding), 0, 0, 0])
    assert "encoding" in refusal(content + encoding.encode() + b"tR.")


@pytest.mark.parametrize("length", [0, 1, 40, -1])
def test_a_truncated_pickle_is_refused_with_its_size(length: int) -> None:
    content = python2_pickle({"data": PIXELS})[:length]
    assert f"({len(content):,} bytes) is no pickle of arrays" in refusal(content)


def test_a_pickle_of_something_else_is_refused() -> None:
    assert refusal(pickle.dumps([1, 2])).endswith("is a pickled list, not a dict")


FIVE, LABELS = np.zeros((5, 24), np.uint8), list(range(5))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": LABELS}, "has no uint8 array 'data' of shape (5, 24)"),
        ({"data": "x", "labels": LABELS}, "has no uint8 array 'data' of shape (5, 24)"),
        ({"data": PIXELS, "labels": LABELS}, "has no uint8 array 'data' of shape (5, 24)"),
        ({"data": FIVE}, "has no list 'labels' of 5 labels from 0 to 9"),
        ({"data": FIVE, "labels": LABELS[1:]}, "has no list 'labels' of 5 labels from 0 to 9"),
        ({"data": FIVE, "labels": [0, 1, 2, 3, 10]}, "has no list 'labels' of 5 labels"),
        ({"data": FIVE, "labels": [0, 1, 2, 3, -1]}, "has no list 'labels' of 5 labels"),
        ({"data": FIVE, "labels": [0, 1, 2, 3, "4"]}, "has no list 'labels' of 5 labels"),
    ],
)
def test_a_batch_of_another_content_is_refused(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        CIFAR_PYTHON.decode(INFOS["cifar10"], [File("f", pickle.dumps(batch, 4))], 5)
    assert message in str(caught.value)

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


def text(value: str) -> bytes:
    """The opcode BINUNICODE with a text."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def called(module: str, name: str, arguments: bytes) -> bytes:
    """The opcodes of a call: GLOBAL, what pushes a tuple, REDUCE."""
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


# () in a tuple in a tuple and so on. Its hash recurses once a level, past any stack.
DEEP = b")" + 300_000 * b"\x85"
# t = (t, t), 60 times: DUP, TUPLE2. Its hash and its text are of 2⁶⁰ parts.
WIDE = b")" + 60 * b"2\x86"


def test_a_deep_tuple_as_a_key_is_refused() -> None:
    assert "it has a key of type tuple, not text" in refusal(b"\x80\2}" + DEEP + b"K\1s.")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"}", b"K\1s"),
        (b"}(", b"K\1u"),
        (b"(", b"K\1d"),
        (b"}(0", b"K\1s"),  # a mark, dropped
        (b"}", b"20K\1s"),  # a copy, dropped
        (b"}", b"r\7\0\0\x000j\7\0\0\0K\1s"),  # out of the memo
        (b"}", b"\x940h\0K\1s"),  # out of the memo, counted
        (b"}", b"NbK\1s"),  # BUILD with None
        (b"}", b"(uK\1s"),  # SETITEMS of nothing
    ],
    ids=["item", "items", "dict", "mark", "copy", "memo", "count", "build", "nothing"],
)
def test_a_tuple_is_no_key_whichever_way_it_becomes_one(before: bytes, after: bytes) -> None:
    assert "it has a key of type " in refusal(b"\x80\4" + before + WIDE + after + b".")


@pytest.mark.parametrize("opcodes", [(b"\x8f(", b"\x90"), (b"(", b"\x91")], ids=["set", "frozen"])
def test_a_set_is_refused_before_anything_in_it_is_hashed(opcodes: tuple[bytes, bytes]) -> None:
    assert "it has a set at opcode" in refusal(b"\x80\4" + opcodes[0] + WIDE + opcodes[1] + b".")


@pytest.mark.parametrize(
    ("value", "module", "name", "after"),
    [
        (DEEP, "dill._dill", "_get_attr", text("x") + b"\x86"),
        (WIDE, "dill._dill", "_get_attr", text("x") + b"\x86"),
        (WIDE, "dill._dill", "_import_module", b"\x85"),
        (WIDE, "_codecs", "encode", text("latin1") + b"\x86"),
        (WIDE, "numpy", "dtype", b"\x85"),
    ],
    ids=["get_attr, deep", "get_attr", "import_module", "encode", "dtype"],
)
def test_what_should_be_text_is_neither_hashed_nor_printed(
    value: bytes, module: str, name: str, after: bytes
) -> None:
    content = b"\x80\4}" + text("a") + called(module, name, value + after) + b"s."
    assert "it has a value of type tuple, not text" in refusal(content)


def test_an_encoding_that_is_no_text_is_not_printed() -> None:
    arguments = text("a") + WIDE + b"\x86"
    content = b"\x80\4}" + text("a") + called("_codecs", "encode", arguments) + b"s."
    assert "it has a value of type tuple, not text" in refusal(content)


@pytest.mark.parametrize("kind", [dict, list])
def test_a_container_in_two_places_is_refused(kind: type) -> None:
    """Each of 40 is twice in the next: copies of them would be 2⁴⁰."""
    found: Any = [1]
    for _ in range(40):
        found = {"0": found, "1": found} if kind is dict else [found, found]
    assert " in two places" in refusal(pickle.dumps({"a": found}, 4))


def test_an_array_in_two_places_is_read_and_so_is_the_empty_tuple() -> None:
    batch = load_arrays(pickle.dumps({"a": [PIXELS, PIXELS], "b": (), "c": ()}, 4), "f", KINDS)
    np.testing.assert_array_equal(batch["a"][0], batch["a"][1])
    assert batch["b"] == batch["c"] == ()


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_deep_containers_are_refused(depth: int) -> None:
    assert "is no pickle" in refusal(b"\x80\2}" + text("a") + depth * b"]" + depth * b"a" + b"s.")


@pytest.mark.parametrize("key", [1, 1.5, None, b"a", "a"])
def test_keys_are_text_or_bytes(key: Any) -> None:
    content = pickle.dumps({key: 1}, 4)
    if isinstance(key, str | bytes):
        assert load_arrays(content, "f", KINDS) == {key: 1}
    else:
        assert "it has a key of type " in refusal(content)


def test_an_array_is_no_key() -> None:
    array = called("numpy.core.multiarray", "_reconstruct", b")")
    assert "it has a key of type _Array, not text" in refusal(b"\x80\2}" + array + b"K\1s.")


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (RECONSTRUCT, "_StandIn"),
        (RECONSTRUCT + b")R", "_Array"),  # of which nothing was said
        (called("numpy", "dtype", text("u1") + b"\x85"), "_DType"),
        (b"N", "NoneType"),
    ],
    ids=["function", "array", "dtype", "none"],
)
@pytest.mark.parametrize("ends", [(b"", b""), (b"](", b"e")], ids=["alone", "list"])
def test_only_data_comes_out(value: bytes, name: str, ends: tuple[bytes, bytes]) -> None:
    content = b"\x80\2}" + text("a") + ends[0] + value + ends[1] + b"s."
    assert f"it has a value of type {name}" in refusal(content)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (b"}" + text("value") + text("i8") + b"s", "'_StandIn' object has no attribute '__dict__'"),
        (b"N}" + text("value") + text("i8") + b"s\x86", "it sets 'value' of a function"),
        (b"N}" + text("_function") + RECONSTRUCT + b"s\x86", "it sets '_function' of a function"),
    ],
    ids=["dict", "slots", "own slot"],
)
def test_a_pickle_sets_no_attribute_of_a_stand_in(state: bytes, expected: str) -> None:
    said = refusal(b"\x80\2" + RECONSTRUCT + state + b"b.")
    assert said.endswith(expected)


@pytest.mark.parametrize(
    "dtype", [RECONSTRUCT, text("u1"), b"K\1"], ids=["function", "text", "int"]
)
@pytest.mark.parametrize("form", ["scalar", "_frombuffer", "_create_array", "BUILD"])
def test_the_kind_of_numbers_is_one_that_was_checked(dtype: bytes, form: str) -> None:
    raw, one = b"C\x01a", b"K\1\x85"  # one byte, and (1,)
    state = b"(K\1" + one + dtype + b"\x89" + raw + b"t"
    content = {
        "scalar": called("numpy.core.multiarray", "scalar", dtype + raw + b"\x86"),
        "_frombuffer": called(
            "numpy.core.numeric", "_frombuffer", b"(" + raw + dtype + one + text("C") + b"t"
        ),
        "_create_array": called("dill._dill", "_create_array", b"NN" + state + b"\x87"),
        "BUILD": RECONSTRUCT + b")R" + state + b"b",
    }[form]
    said = refusal(b"\x80\3}" + text("a") + content + b"s.")
    assert "it has an array of type " in said
    assert said.endswith(", no dtype")


def test_a_name_that_the_file_wants_is_escaped_and_cut() -> None:
    assert r"it wants \x1b[31mevil\x07.x" in refusal(b"\x80\2c\x1b[31mevil\x07\nx\n.")
    said = refusal(b"\x80\2c" + 1_000_000 * b"o" + b"\nx\n.")
    assert "it wants ooo" in said
    assert len(said) < 300


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

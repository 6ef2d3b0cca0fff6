"""Run folders from strangers: refused, escaped or bounded, and nothing outside them is touched.

What archives, pickles and images may hold has tests beside their readers, and names in reports
beside the report; docs/reliability.md has the list.
"""

import json
import os
import resource
import struct
import tracemalloc
import zipfile
import zlib

import pytest
from fault_tools import SMALL, arguments, command

from normlab import run
from normlab.config import load_config
from normlab.data import check_source
from normlab.data.images import Encoded
from normlab.errors import UserError
from normlab.files import BLOCK, LARGEST_JSON, blocks_of
from normlab.report.files import read_metrics

LOOKERS = (["status"], ["watch", "--once"], ["report"])
"""Commands that show whatever is there."""

TEXTS = {
    "empty": "",
    "zeros": "\x00" * 100,
    "no object": "[1, 2]",
    "deep": '{"a": ' * 100_000,
    "deep lists": "[" * 100_000,
    "digits": '{"step": ' + "9" * 5000 + "}",
    "large": '{"step": ' + "9" * 400 + ', "seed": 1e999999, "schema_version": -1e308}',
    "names": json.dumps({"<script>": "\x1b[2J\n\r\u202e", "status": "<b>", "id": "../../x"}),
    "not a number": '{"step": NaN, "loss": Infinity, "status": null}',
}
FILES = ("config.json", "manifest.json", "status.json", "result.json", "metrics.jsonl")
FILES += ("timing.jsonl", "identity.json", "sweep.json", "verdict.json")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_whatever_stands_in_a_file_of_a_run_it_can_be_looked_at(own, text, capsys):
    for name in FILES:
        path = own / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(text)
        for words in LOOKERS[:2]:
            code, errors = command([*words, str(own)], capsys)
            assert code in (0, 2), (name, words, errors)
            assert len(errors) <= 1, (name, words, errors)
        path.unlink() if before is None else path.write_bytes(before)
    # Drawing takes long, so all at once; tests/report has each by itself.
    for name in FILES[1:]:
        (own / name).write_text(text)
    code, errors = command(["report", str(own)], capsys)
    assert code in (0, 2), errors
    assert len(errors) <= 1, errors


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_whatever_stands_in_a_file_of_a_run_evaluating_it_is_done_or_refused(own, text, capsys):
    for path in [*map(own.joinpath, FILES[:2]), own / "identity.json"]:
        before = path.read_bytes()
        path.write_text(text)
        code, errors = command(["eval", str(own)], capsys)
        # Only what is a JSON object can be of some use.
        assert code in (0, 2), (path, errors)
        assert all(line.startswith("normlab: ") and len(line) < 1000 for line in errors)
        path.write_bytes(before)
    path = own / "checkpoints" / "12" / "manifest.json"
    path.write_text(text)
    code, errors = command(["eval", str(own)], capsys)
    assert (code, len(errors)) == (0, 1)
    assert "checkpoints/12" in errors[0]
    assert errors[0].endswith("using the one before it")


HUGE = {
    "train.batch_size": 10**18,
    "train.num_steps": 10**400,
    "log.every_steps": 10**400,
    "optim.base_lr": 10**400,
    "optim.warmup_epochs": 1e308,
    "model.widths": [10**6, 10**6],  # 36 TB of weights
    "norm.epsilon": 10**400,
    "data.num_validation": 10**30,
    "data.crop_padding": 10**9,
    "probe.unit": 10**400,
    "seed": 10**30,
    "norm.momentum": "1" * 10**6,
}


@pytest.mark.parametrize(("name", "value"), HUGE.items(), ids=HUGE)
def test_a_config_with_huge_numbers_is_refused_without_the_memory_for_them(
    own, name, value, capsys
):
    saved = run.read_json(own / "config.json")
    section, _, key = name.rpartition(".")
    (saved[section] if section else saved)[key] = value
    (own / "config.json").write_text(json.dumps(saved))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, errors = command(["eval", str(own)], capsys)
    assert code == 2
    assert len(errors) == 1
    assert len(errors[0]) < 600
    # Kilobytes: what a first evaluation takes of code and buffers, far from 36 TB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


@pytest.mark.parametrize(
    ("field", "value"),
    [("train.num_steps", "9" * 5000), ("optim.base_lr", "1e999"), ("seed", "-1")],
)
def test_a_huge_number_on_the_command_line_is_a_short_line(tmp_path, field, value, capsys):
    words = arguments(tmp_path / "run")
    words = [word for word in words if not word.startswith(f"--config.{field}=")]
    code, errors = command([*words, f"--config.{field}={value}"], capsys)
    assert (code, len(errors)) == (2, 1)
    assert field in errors[0]
    assert len(errors[0]) < 300
    assert not (tmp_path / "run").exists()


def test_a_program_in_a_run_folder_is_not_run(own, tmp_path, capsys):
    """A config's source is Python, and `eval` and `rerun` load it: one brought along is refused."""
    program = own / "digits.py"
    program.write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    link = tmp_path / "elsewhere.py"
    link.symlink_to(program)
    saved = run.read_json(own / "config.json")
    for source in (program, own / "checkpoints" / ".." / "digits.py", link):
        (own / "config.json").write_text(json.dumps(saved | {"source": f"{source}:norm=none"}))
        for words in (["eval", str(own)], ["rerun", str(own), f"--workdir={tmp_path / 'new'}"]):
            code, errors = command(words, capsys)
            assert (code, len(errors)) == (2, 1)
            assert "a program in the run's own folder, which is not run" in errors[0]
    assert not (tmp_path / "was run").exists()


# Links, pipes, devices


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "log.txt", "lock"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_run_writes_through_no_link(own, tmp_path, name, kind, capsys):
    """Logs are cut back and appended to: through a link that would be a file of the user's."""
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    (own / "result.json").unlink()
    path = own / name
    path.unlink()
    {"link": lambda: path.symlink_to(precious), "pipe": lambda: os.mkfifo(path)}.get(
        kind, path.mkdir
    )()
    code, errors = command(arguments(own), capsys)
    assert (code, len(errors)) == (2, 1)
    assert f"{path} is a link or no file; a run writes only into its own folder" in errors[0]
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_nobody_waits_for_a_pipe_or_reads_a_device(own, name, kind, capsys):
    path = own / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    for words in LOOKERS:
        code, errors = command([*words, str(own)], capsys)
        assert code in (0, 2), (words, errors)
    if name in ("config.json", "manifest.json", "identity.json"):
        code, errors = command(["eval", str(own)], capsys)
        assert code == 1
        assert errors == [f"normlab: {path}: it is no regular file"]


def test_a_checkpoints_file_that_leads_to_a_device_is_none(own, capsys):
    state = own / "checkpoints" / "12" / "state"
    path = next(path for path in state.rglob("*") if path.is_file())
    path.unlink()
    path.symlink_to("/dev/zero")
    code, errors = command(["eval", str(own)], capsys)
    assert (code, len(errors)) == (0, 1)
    assert "checkpoints/12 is damaged" in errors[0]


# Sizes


def test_a_log_of_a_gigabyte_without_an_end_of_line_is_read_in_little_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"step": 1, "split": "test", "accuracy": 0.5}) + "\n"
    path.write_text(good)
    os.truncate(path, 2**30)  # zeros that take no room on the disk
    with path.open("a") as file:
        file.write("\n" + good.replace("1", "2"))
    notes = []
    tracemalloc.start()
    curve, _ = read_metrics(path, notes, required=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert curve == ((1, 0.5), (2, 0.5))
    assert notes == ["metrics.jsonl: 1 unreadable (line 2)"]
    assert peak < 4 * BLOCK


@pytest.mark.parametrize("ends", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_lines_are_whole_wherever_a_block_ends(tmp_path, ends):
    path = tmp_path / "log"
    lines = [b"a" * ends, b"", b"b" * 10, b"c"]
    path.write_bytes(b"\n".join(lines))
    found = [line for block in blocks_of(path) for line in block]
    if ends >= BLOCK:  # its end is not in the block of its beginning: what is left is no JSON
        assert found[0].startswith(b"\0")
        found[0] = lines[0]
    assert found == lines


def test_a_log_of_many_lines_is_never_whole_in_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 7, "split": "train", "loss": 0.1, "note": "x" * 900}) + "\n"
    path.write_text(line * 60_000)  # 58 MB
    tracemalloc.start()
    read_metrics(path, [], required=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2
    assert sum(map(len, blocks_of(path))) == 60_000 + 1  # and nothing behind the last one


@pytest.mark.parametrize("name", ["config.json", "status.json", "sweep.json", "verdict.json"])
def test_a_json_file_of_gigabytes_is_not_read(own, name, capsys):
    path = own / name
    path.touch()
    os.truncate(path, 2**34)
    tracemalloc.start()
    for words in (["status"], ["watch", "--once"]):
        code, errors = command([*words, str(own)], capsys)
        assert code in (0, 2), errors
    if name == "config.json":
        code, errors = command(["eval", str(own)], capsys)
        assert code == 2
        assert errors == [f"normlab: {path} is not JSON: it has more than {LARGEST_JSON:,} bytes"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * LARGEST_JSON


def test_a_zip_bomb_is_refused_unopened(tmp_path):
    """No data set is published as zip, so none is read: a gigabyte of zeros stays in its file."""
    path = tmp_path / "mnist.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("x", "w") as member:
        for _ in range(2**10):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**21
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        check_source(load_config("configs/mnist.py", {"data.path": str(path)}).data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 2**24


def test_an_image_that_unpacks_to_gigabytes_is_named_and_not_unpacked():
    """30,000 × 30,000 pixels in a kilobyte: the header alone says so, and Pillow has a limit."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    images = Encoded(1, lambda i: (content, 0), lambda i: "bomb.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"image 'bomb\.png' cannot be decoded: Image size"):
        images.decode(0, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kilobytes


# Lines on a terminal


def test_a_name_with_line_breaks_is_one_line_of_an_error(tmp_path, capsys):
    folder = tmp_path / "a\n\x1b[2Jb"
    for words in (["status"], ["eval"], ["report"], ["watch", "--once"]):
        code, errors = command([*words, str(folder)], capsys)
        assert (code, len(errors)) == (2, 1)
        assert "\x1b" not in errors[0]
    folder.mkdir()
    (folder / "identity.json").write_text("{")
    code, errors = command(arguments(folder), capsys)
    assert (code, len(errors)) == (2, 1)
    assert "\x1b" not in errors[0]


def test_metrics_of_another_format_are_told_and_what_is_readable_is_shown(own, capsys):
    with (own / "metrics.jsonl").open("a") as file:
        file.write("step=12 loss=0.3\n")
        file.write('{"epoch": 3, "val_acc": "97%"}\n')
        file.write('{"step": "13", "split": "test", "accuracy": "0.9"}\n')
    code, errors = command(["report", str(own)], capsys)
    assert (code, errors) == (0, [])
    page = (own / "report.md").read_text()
    assert "metrics.jsonl: 1 unreadable (line 6)" in page
    assert SMALL["train.num_steps"] == 12

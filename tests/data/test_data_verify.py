"""`normlab data verify` on archives: every file that is wrong, with its size and checksum."""

import hashlib
from pathlib import Path

import pytest
from official import INFOS, cifar, gzipped, idx, python2_pickle, write, write_tar

from normlab.cli import main
from normlab.data import archive
from normlab.data.verify import OFFICIAL_MD5, guess_source, verify

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The miniature of CIFAR-10, binary; its checksums take the place of the official ones."""
    files = cifar("cifar10", "binary")
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(OFFICIAL_MD5, "cifar10", sums)
    return files


def faults(path: Path, name: str = "cifar10") -> dict[str, str]:
    return {x.file: x.fault for x in verify(name, "archive", str(path)) if x.fault}


def test_official_files_have_no_fault(files, tmp_path):
    folder = write(tmp_path / "cifar-10-batches-bin", files)
    assert faults(tmp_path) == {}
    assert faults(write_tar(tmp_path / "mine.tar.gz", files)) == {}
    found = list(verify("cifar10", "archive", str(tmp_path)))
    assert [x.file for x in found] == [str(folder / name) for name in sorted(files)]
    # Ten training images in five files, five test images: a label and 2 · 4 · 3 bytes each.
    assert [x.size for x in found] == [50, 50, 50, 50, 50, 125]


@pytest.mark.parametrize("packed", [False, True])
def test_every_wrong_file_is_named_with_what_is_wrong(files, tmp_path, packed):
    flipped = bytearray(files["data_batch_2.bin"])
    flipped[7] ^= 1
    files["data_batch_2.bin"] = bytes(flipped)
    files["data_batch_4.bin"] = files["data_batch_4.bin"][:-3]
    files["test_batch.bin"] += b"\0"
    del files["data_batch_5.bin"]
    if packed:
        where = write_tar(tmp_path / "mine.tar.gz", files)
        start = f"{where}:"
    else:
        where = write(tmp_path / "cifar-10-batches-bin", files)
        start = f"{where}/"
    found = {name.removeprefix(start): fault for name, fault in faults(where).items()}
    assert found.keys() == {
        "data_batch_2.bin",
        "data_batch_4.bin",
        "data_batch_5.bin",
        "test_batch.bin",
    }
    md5 = hashlib.md5(bytes(flipped)).hexdigest()
    official = OFFICIAL_MD5["cifar10"]["data_batch_2.bin"]
    assert found["data_batch_2.bin"] == f"MD5 {md5}, not {official}"
    assert found["data_batch_4.bin"] == "47 bytes, not 50"
    assert found["test_batch.bin"] == "more than 125 bytes"
    assert "missing" in found["data_batch_5.bin"]


def test_an_archive_cut_off_keeps_what_could_be_read(files, tmp_path):
    path = write_tar(tmp_path / "mine.tar", files)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    found = faults(path)
    assert 1 <= len(found) < 6
    assert all(fault.startswith("missing; the archive is damaged: ") for fault in found.values())


def test_an_archive_under_its_official_name_must_be_the_official_one(files, tmp_path):
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", files)
    size = path.stat().st_size
    assert faults(path) == {str(path): f"{size:,} bytes, not 170,052,171"}


def test_gzipped_idx_files_are_judged_by_what_is_in_them(tmp_path, monkeypatch):
    files = idx("mnist")
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(OFFICIAL_MD5, "mnist", sums)
    folder = write(tmp_path / "mnist", gzipped(files))
    assert faults(tmp_path, "mnist") == {}
    broken = bytearray((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    broken[-5] ^= 1  # of gzip's own checksum and size
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(broken)
    [(name, fault)] = faults(tmp_path, "mnist").items()
    assert "t10k-labels-idx1-ubyte" in name
    assert "is damaged: " in fault


def test_a_file_without_published_checksum_says_so(tmp_path):
    folder = write(tmp_path / "cifar-100-binary", cifar("cifar100", "binary"))
    found = list(verify("cifar100", "archive", str(folder)))
    assert not any(x.fault for x in found)
    assert all("labels alone; no published checksum, so the con" in x.note for x in found)
    assert all(x.verdict == "ok" for x in found)
    pickled = write(tmp_path / "cifar-100-python", cifar("cifar100", "python", python2_pickle))
    assert all("MD5" in x.fault for x in verify("cifar100", "archive", str(pickled)))


@pytest.mark.parametrize(
    ("column", "label", "fault"),
    [
        (0, 20, "record 1 has coarse label 20, not one from 0 to 19"),
        (1, 100, "record 1 has label 100, not one from 0 to 99"),
        (1, 255, "record 1 has label 255, not one from 0 to 99"),
    ],
)
def test_labels_of_cifar100s_binary_files_are_checked(tmp_path, column, label, fault):
    files = cifar("cifar100", "binary")
    content = bytearray(files["test.bin"])
    record = len(content) // INFOS["cifar100"].num_test
    content[record + column] = label
    files["test.bin"] = bytes(content)
    folder = write(tmp_path / "cifar-100-binary", files)
    assert faults(folder, "cifar100") == {str(folder / "test.bin"): fault}
    content[record + column] -= 1 if label < 255 else 156  # the highest there is
    (folder / "test.bin").write_bytes(content)
    assert faults(folder, "cifar100") == {}


def test_every_layout_but_cifar100_binary_has_published_checksums():
    for name, layouts in archive.LAYOUTS.items():
        for layout in layouts:
            known = [file in OFFICIAL_MD5[name] for file in layout.train + layout.test]
            assert all(known) or layout.archive == "cifar-100-binary.tar.gz"


def test_the_command_prints_a_line_a_file_and_exits_2(files, tmp_path, capsys):
    folder = write(tmp_path / "cifar-10-batches-bin", files)
    command = ["data", "verify", "cifar10", f"--path={tmp_path}"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("cifar10 (archive): nothing is wrong\n")
    (folder / "test_batch.bin").write_bytes(b"")
    assert main(command) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "cifar10 (archive): 1 wrong"
    [wrong] = [line for line in lines if "WRONG" in line]
    assert wrong.startswith(f"{folder / 'test_batch.bin'}  0 bytes  MD5 d41d8cd98f00b204e98009")
    assert wrong.endswith("WRONG: 0 bytes, not 125")


def test_what_lies_at_a_path_tells_its_source(files, tmp_path):
    assert guess_source("cifar10", str(tmp_path)) == "archive"
    (tmp_path / "a/train").mkdir(parents=True)
    assert guess_source("cifar10", str(tmp_path / "a")) == "folder"
    (tmp_path / "b/cifar10/3.0.2").mkdir(parents=True)
    (tmp_path / "b/cifar10/3.0.2/dataset_info.json").write_text("{}")
    assert guess_source("cifar10", str(tmp_path / "b")) == "tfds"

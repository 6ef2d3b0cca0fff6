"""The official files in every layout in which people have them, and in the ways they go wrong."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from official import (
    Config,
    cifar,
    dotted,
    gzipped,
    idx,
    python2_pickle,
    splits,
    write,
    write_tar,
)

from normlab.data import archive as archives
from normlab.data import check_source, load
from normlab.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny")


def assert_loads(config: object, name: str) -> None:
    check_source(config)
    data = load(config)
    for split in ("train", "test"):
        images, labels = splits(name)[split]
        loaded = getattr(data, split)
        np.testing.assert_array_equal(loaded.images, images)
        np.testing.assert_array_equal(loaded.labels, labels)
        assert loaded.images.dtype == np.uint8
        assert loaded.labels.dtype == np.int32


def refused(config: object, check: Callable[[object], object] = check_source) -> str:
    with pytest.raises(UserError) as caught:
        check(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Layouts -----------------------------------------------------------------------------------------

FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar100", "binary"): "cifar-100-binary",
}
VERSIONS = pytest.mark.parametrize(("name", "version"), FOLDERS)


@VERSIONS
def test_cifar_unpacked(name: str, version: str, tmp_path: Path, archive: Config) -> None:
    folder = write(tmp_path / FOLDERS[name, version], cifar(name, version, python2_pickle))
    assert_loads(archive(name, folder), name)
    assert_loads(archive(name, tmp_path), name)


@VERSIONS
def test_cifar_official_archive(
    name: str, version: str, tmp_path: Path, archive: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = name.replace("cifar", "cifar-")
    path = tmp_path / f"{stem}-{version}.tar.gz"
    write_tar(path, cifar(name, version, python2_pickle))
    content = path.read_bytes()
    published = (len(content), hashlib.md5(content).hexdigest())
    monkeypatch.setitem(archives.PUBLISHED, path.name, published)
    assert_loads(archive(name, path), name)
    assert_loads(archive(name, tmp_path), name)


@VERSIONS
@pytest.mark.parametrize("filename", ["mine.tar.gz", "mine.tgz", "mine.tar"])
def test_cifar_in_an_archive_of_any_name(
    name: str, version: str, filename: str, tmp_path: Path, archive: Config
) -> None:
    path = write_tar(tmp_path / filename, cifar(name, version, python2_pickle))
    assert_loads(archive(name, path), name)


IDX_FORMS = pytest.mark.parametrize(
    "form",
    [dict, gzipped, dotted, lambda files: gzipped(dotted(files))],
    ids=["plain", "gz", "dotted", "dotted.gz"],
)


@IDX_FORMS
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_in_a_folder(
    name: str, form: Callable[..., dict[str, bytes]], tmp_path: Path, archive: Config
) -> None:
    folder = write(tmp_path / name.replace("_", "-"), form(idx(name)))
    assert_loads(archive(name, folder), name)
    assert_loads(archive(name, tmp_path), name)


@IDX_FORMS
@pytest.mark.parametrize("filename", ["mnist.tar.gz", "mnist.tar", "any.tgz"])
def test_idx_in_a_tar(
    form: Callable[..., dict[str, bytes]], filename: str, tmp_path: Path, archive: Config
) -> None:
    path = write_tar(tmp_path / filename, form(idx("mnist")))
    assert_loads(archive("mnist", path), "mnist")
    if filename.startswith("mnist"):
        assert_loads(archive("mnist", tmp_path), "mnist")


def test_idx_where_torchvision_puts_it(tmp_path: Path, archive: Config) -> None:
    write(tmp_path / "FashionMNIST" / "raw", idx("fashion_mnist"))
    assert_loads(archive("fashion_mnist", tmp_path), "fashion_mnist")


def test_a_home_folder_is_understood(
    tmp_path: Path, archive: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data", idx("mnist"))
    assert_loads(archive("mnist", "~/data"), "mnist")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_versions_have_one_fingerprint(name: str, tmp_path: Path, archive: Config) -> None:
    binary = load(archive(name, write(tmp_path / "b", cifar(name, "binary"))))
    python = load(archive(name, write(tmp_path / "p", cifar(name, "python", python2_pickle))))
    assert binary.fingerprint == python.fingerprint


def test_one_pixel_changes_the_fingerprint(tmp_path: Path, archive: Config) -> None:
    files = idx("mnist")
    before = load(archive("mnist", write(tmp_path, files))).fingerprint
    images = files["t10k-images-idx3-ubyte"]
    files["t10k-images-idx3-ubyte"] = images[:-1] + bytes([images[-1] ^ 1])
    assert load(archive("mnist", write(tmp_path, files))).fingerprint != before


def test_the_same_bytes_under_another_name_have_another_fingerprint(
    tmp_path: Path, archive: Config
) -> None:
    write(tmp_path, idx("mnist"))
    fingerprints = {
        load(archive(name, tmp_path)).fingerprint for name in ("mnist", "fashion_mnist")
    }
    assert len(fingerprints) == 2


# Paths that lead nowhere -------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, ""])
def test_an_unset_path_says_what_it_names(path: str | None, archive: Config) -> None:
    message = refused(archive("cifar10", path))
    assert message.startswith(
        "config field 'data.path' is not set; it names cifar-10-python.tar.gz"
    )


def test_a_path_that_does_not_exist_is_named(tmp_path: Path, archive: Config) -> None:
    assert refused(archive("mnist", tmp_path / "no")).endswith("/no' does not exist")


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path, archive: Config) -> None:
    message = refused(archive("cifar100", tmp_path))
    assert "holds no 'cifar100'; looked for cifar-100-python/, cifar-100-python.tar.gz" in message


def test_a_folder_with_another_data_set_says_which(tmp_path: Path, archive: Config) -> None:
    write(tmp_path / "cifar-10-batches-bin", cifar("cifar10", "binary"))
    assert "holds no 'cifar100'; it holds 'cifar10'" in refused(archive("cifar100", tmp_path))


def test_an_archive_of_another_data_set_says_which(tmp_path: Path, archive: Config) -> None:
    path = write_tar(tmp_path / "mine.tar.gz", cifar("cifar10", "binary"))
    assert "holds no 'cifar100'; it holds 'cifar10'" in refused(archive("cifar100", path))
    official = tmp_path / "cifar-10-binary.tar.gz"  # known by its name, without opening it
    official.write_bytes(b"")
    assert "holds no 'mnist'; it holds 'cifar10'" in refused(archive("mnist", official))


def test_fashion_mnist_is_not_taken_for_mnist(
    tmp_path: Path, archive: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = idx("fashion_mnist")
    digest = hashlib.md5(files["train-labels-idx1-ubyte"]).hexdigest()
    monkeypatch.setattr("normlab.data.decode._LABELS_MD5", {digest: "fashion_mnist"})
    write(tmp_path, files)
    message = refused(archive("mnist", tmp_path), load)
    assert message.endswith("train-labels-idx1-ubyte' is of 'fashion_mnist', not of 'mnist'")
    assert_loads(archive("fashion_mnist", tmp_path), "fashion_mnist")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello" * 500, gzip.compress(b"hello" * 500, mtime=0)],
    ids=["empty", "text", "gzipped text"],
)
def test_a_file_that_is_no_archive_is_refused(
    content: bytes, tmp_path: Path, archive: Config
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert refused(archive("cifar10", path)).startswith("config field 'data.path' = ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(tmp_path: Path, archive: Config) -> None:
    path = write_tar(tmp_path / "mine.tar", idx("mnist"))
    path.chmod(0)
    assert "Permission denied" in refused(archive("mnist", path))


# Files that are missing, cut off or altered ------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path, archive: Config) -> None:
    write(tmp_path, cifar("cifar10", "binary"))
    (tmp_path / "data_batch_4.bin").unlink()
    assert refused(archive("cifar10", tmp_path)).endswith("data_batch_4.bin' is missing")


def test_a_missing_member_is_named(tmp_path: Path, archive: Config) -> None:
    files = idx("mnist")
    del files["t10k-labels-idx1-ubyte"]
    path = write_tar(tmp_path / "mine.tar.gz", files)
    message = refused(archive("mnist", path), load)
    assert message == f"archive {str(path)!r} has no file 't10k-labels-idx1-ubyte'"


def test_a_truncated_file_is_named_with_both_sizes_before_anything_is_read(
    tmp_path: Path, archive: Config
) -> None:
    files = cifar("cifar10", "binary")
    files["test_batch.bin"] = files["test_batch.bin"][:-1]
    write(tmp_path, files)
    # 5 records of 1 + 2 · 4 · 3 = 25 bytes.
    message = refused(archive("cifar10", tmp_path))
    assert message == f"file {str(tmp_path / 'test_batch.bin')!r} has 124 bytes, not 125"


def test_a_file_that_is_too_long_is_refused(tmp_path: Path, archive: Config) -> None:
    files = idx("mnist")
    files["train-labels-idx1-ubyte"] += b"\0"
    # 8 bytes of header and 6 labels.
    assert refused(archive("mnist", write(tmp_path, files))).endswith("has more than 14 bytes")


@pytest.mark.parametrize("cut", [1, 7, 15])  # within gzip's trailer: its length, its checksum
def test_a_truncated_gz_is_named(cut: int, tmp_path: Path, archive: Config) -> None:
    files = gzipped(idx("mnist"))
    name = "train-images-idx3-ubyte.gz"
    files[name] = files[name][:-cut]
    message = refused(archive("mnist", write(tmp_path, files)), load)
    assert message.startswith(f"file {str(tmp_path / name)!r} is damaged: ")


def test_a_flipped_bit_in_a_gz_is_noticed(tmp_path: Path, archive: Config) -> None:
    files = idx("mnist")
    stored = bytearray(gzip.compress(files.pop("train-images-idx3-ubyte"), 0))  # bytes as they are
    stored[60] ^= 1
    files["train-images-idx3-ubyte.gz"] = bytes(stored)
    message = refused(archive("mnist", write(tmp_path, files)), load)
    assert "is damaged: CRC check failed" in message


@pytest.mark.parametrize(("suffix", "length"), [(".tar", 3592), (".tar", 3500), (".tar.gz", 200)])
def test_a_truncated_tar_is_refused(
    suffix: str, length: int, tmp_path: Path, archive: Config
) -> None:
    # A small member takes 1,024 bytes of a tar, half of them its header: the cuts are in the fourth
    # member's content, at 8 bytes, and in its header.
    path = write_tar(tmp_path / f"mine{suffix}", idx("mnist"))
    path.write_bytes(path.read_bytes()[:length])
    message = refused(archive("mnist", path), load)
    assert str(path) in message


def test_an_official_archive_that_is_cut_off_is_named_with_both_sizes(
    tmp_path: Path, archive: Config
) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"\x1f\x8b" + b"\0" * 998)
    message = refused(archive("cifar10", tmp_path))
    start = f"archive {str(path)!r} has 1,000 bytes, the official one 170,498,071; it is cut off"
    assert message.startswith(start)


def test_an_official_archive_with_another_checksum_is_refused_with_both(
    tmp_path: Path, archive: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", cifar("cifar10", "binary"))
    size, official = path.stat().st_size, archives.PUBLISHED[path.name][1]
    monkeypatch.setitem(archives.PUBLISHED, path.name, (size, official))
    config = archive("cifar10", path)
    check_source(config)
    actual = hashlib.md5(path.read_bytes()).hexdigest()
    message = refused(config, load)
    start = f"archive {str(path)!r} has MD5 {actual}, the official one {official}; "
    assert message.startswith(start)
    # Under another name no sum is known, and the content decides.
    assert_loads(archive("cifar10", path.rename(tmp_path / "repacked.tar.gz")), "cifar10")


def test_a_wrong_idx_header_is_refused(tmp_path: Path, archive: Config) -> None:
    files = idx("mnist")
    name = "t10k-images-idx3-ubyte"
    files[name] = files[name][:3] + b"\4" + files[name][4:]  # four axes
    message = refused(archive("mnist", write(tmp_path, files)), load)
    assert message.endswith("has not the header of an idx file of (4, 3, 5)")


def test_a_label_out_of_range_is_refused(tmp_path: Path, archive: Config) -> None:
    files = cifar("cifar10", "binary")
    files["test_batch.bin"] = b"\x0a" + files["test_batch.bin"][1:]
    message = refused(archive("cifar10", write(tmp_path, files)), load)
    assert message == "data set 'cifar10': test label 10 is not one from 0 to 9"


# Archives that mean harm -------------------------------------------------------------------------


def test_a_gz_bomb_is_not_unpacked(tmp_path: Path, archive: Config) -> None:
    files = gzipped(idx("mnist"))
    files["train-labels-idx1-ubyte.gz"] = gzip.compress(bytes(2**24))
    config = archive("mnist", write(tmp_path, files))
    tracemalloc.start()
    message = refused(config, load)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22
    assert message.endswith("train-labels-idx1-ubyte.gz' has more than 14 bytes")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_tar_bomb_is_not_unpacked(
    kind: bytes, tmp_path: Path, archive: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A member, or a member's name or its attributes, which tarfile holds in memory.
    monkeypatch.setattr(archives, "_LARGEST", 2**20)
    path = tmp_path / "mine.tar.gz"
    member = tarfile.TarInfo("bomb")
    member.type, member.size = kind, 2**24
    path.write_bytes(gzip.compress(member.tobuf() + bytes(2**24), 1))
    message = refused(archive("mnist", path))
    assert message.endswith("cannot be read: it unpacks to more than the data set has")


def test_nothing_is_written_wherever_a_members_name_leads(tmp_path: Path, archive: Config) -> None:
    path = tmp_path / "in" / "mine.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, content in idx("mnist").items():
            member = tarfile.TarInfo(f"../{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert_loads(archive("mnist", path), "mnist")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_a_link_in_a_tar_is_no_file(tmp_path: Path, archive: Config) -> None:
    files = idx("mnist")
    del files["t10k-labels-idx1-ubyte"]
    path = write_tar(tmp_path / "mine.tar", files)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("folder/t10k-labels-idx1-ubyte")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert refused(archive("mnist", path), load).endswith("has no file 't10k-labels-idx1-ubyte'")


def test_a_python_file_that_is_too_long_is_refused_unread(tmp_path: Path, archive: Config) -> None:
    files = cifar("cifar10", "python", pickle.dumps)
    files["test_batch"] += bytes(20_000)
    # 5 examples: 24 pixels and room for 200 bytes each, and 10,000.
    assert refused(archive("cifar10", write(tmp_path, files))).endswith("more than 11,120 bytes")

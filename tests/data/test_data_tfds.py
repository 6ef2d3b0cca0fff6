"""Directories of tensorflow-datasets: written, read and verified without TensorFlow."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official import cifar, data_config, idx, write
from PIL import Image

from normlab.cli import main
from normlab.data import DATASETS, Encoded, describe, load
from normlab.data.prepare import target
from normlab.data.prepare import write as prepare
from normlab.data.verify import verify
from normlab.errors import UserError

pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
pytestmark = pytest.mark.usefixtures("tiny")


def at(path: Path, name: str = "cifar10", source: str = "tfds", **fields):
    return data_config(name=name, source=source, path=str(path), **fields)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """The miniature of CIFAR-10 in a TFDS directory, and its archive beside it."""
    write(tmp_path / "cifar-10-batches-bin", cifar("cifar10", "binary"))
    assert prepare(load(at(tmp_path, source="archive")), tmp_path) == tmp_path / "cifar10/3.0.2"
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_prepared_directory_holds_the_archives_examples_in_their_order(tmp_path, name):
    files = cifar(name, "binary") if name == "cifar10" else idx(name)
    write(tmp_path / {"cifar10": "cifar-10-batches-bin", "mnist": "mnist"}[name], files)
    there = load(at(tmp_path, name, source="archive"))
    prepare(there, tmp_path)
    read = load(at(tmp_path, name))
    for split in ("train", "test"):
        a, b = getattr(read, split), getattr(there, split)
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    # So a run from the one goes on from the other.
    assert read.fingerprint == there.fingerprint


def test_tensorflow_datasets_reads_it_too_and_nothing_imports_tensorflow(prepared):
    code = f"""
import sys
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(prepared / "cifar10/3.0.2")!r}).as_data_source("train")
print(len(source), source[3]["image"].shape, source[3]["id"].decode())
named = tfds.data_source("cifar10", data_dir={str(prepared)!r}, split="test", download=False)
print(len(named), "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["10 (2, 4, 3) train_00003", "5 False"]


def test_the_newest_version_is_read_wherever_the_path_points(prepared):
    older = prepared / "cifar10/2.9.0"
    older.mkdir()
    (older / "dataset_info.json").write_text("{}")
    for path in (prepared, prepared / "cifar10", prepared / "cifar10/3.0.2"):
        assert len(load(at(path)).train) == 10
    with pytest.raises(UserError, match=r"2\.9\.0/dataset_info\.json' is damaged: 'splits'$"):
        load(at(older))


def test_nothing_is_overwritten(prepared):
    with pytest.raises(UserError, match=r"cifar10/3\.0\.2' is there already; move it away"):
        prepare(load(at(prepared)), prepared)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two images of one class to train and two to test on, and a TFDS directory of them in `to`."""
    draw = np.random.default_rng(0)
    for i, shape in enumerate([(20, 30), (25, 16), (16, 16), (40, 30)]):
        folder = tmp_path / ("train", "val")[i // 2] / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    source = load(at(tmp_path, "pets", "folder"))
    assert prepare(source, tmp_path / "to") == tmp_path / "to/pets/1.0.0"
    return tmp_path / "to"


def test_images_of_any_size_keep_their_bytes(pets):
    source, read = load(at(pets.parent, "pets", "folder")), load(at(pets, "pets"))
    assert isinstance(read.train, Encoded)
    assert [read.train.read(i) for i in range(2)] == [source.train.read(i) for i in range(2)]
    assert read.info == source.info


def left_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*")) if folder.exists() else []


def test_a_prepare_that_ends_badly_leaves_nothing(pets, tmp_path):
    (tmp_path / "train/cat/1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.jpg' is in no format that Pillow reads$"):
        prepare(load(at(tmp_path, "pets", "folder")), tmp_path / "other")
    assert left_in(tmp_path / "other") == []

    def interrupted(i):
        assert left_in(tmp_path / "other")  # it is at work
        raise KeyboardInterrupt

    source = load(at(tmp_path, "pets", "folder"))
    train = dataclasses.replace(source.train, read=interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(source, train=train), tmp_path / "other")
    assert left_in(tmp_path / "other") == []


def test_what_a_killed_prepare_left_is_named_and_kept(tmp_path, caplog):
    leftover = tmp_path / "digits/incomplete.ABC123_1.0.0"
    leftover.mkdir(parents=True)
    prepare(load(data_config()), tmp_path)
    assert f"{leftover} is of a prepare that was killed" in caplog.text
    assert {path.name for path in (tmp_path / "digits").iterdir()} == {leftover.name, "1.0.0"}
    assert not (tmp_path / "downloads").exists()


@pytest.mark.parametrize("name", ["a\nb", " a", "a\u2028b", "caf\udce9"])
def test_a_class_name_that_could_not_be_read_back_is_refused(pets, tmp_path, name):
    source = load(at(tmp_path, "pets", "folder"))
    named = dataclasses.replace(source, info=dataclasses.replace(source.info, class_names=(name,)))
    with pytest.raises(UserError, match=r"^class '.*' cannot be written: line breaks, blanks"):
        prepare(named, tmp_path / "other")
    assert left_in(tmp_path / "other") == []


def test_a_place_or_name_that_is_no_folders_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for to in ("file", "file/deeper"):
        with pytest.raises(UserError, match=r"^--to='.*': '.*/file' is not a folder$"):
            target("digits", tmp_path / to)
    for name in ("../up", "a/b", "a b", "", ".."):
        with pytest.raises(UserError, match=r"a name to prepare has letters, digits, _ and - alo"):
            target(name, tmp_path)


def relabelled(pets: Path) -> None:
    """Gives the directory one class less than its labels need: writes two, says one."""
    for split in ("train", "val"):
        (pets.parent / split / "dog").mkdir()
        for image in (pets.parent / split / "cat").iterdir():
            shutil.copy(image, pets.parent / split / "dog")
    shutil.rmtree(pets)
    prepare(load(at(pets.parent, "pets", "folder")), pets)
    (pets / "pets/1.0.0/label.labels.txt").write_text("cat\n")


def test_a_label_of_no_class_is_refused_and_found(pets):
    relabelled(pets)
    with pytest.raises(UserError, match=r"train\[2\]' has label 1, not one from 0 to 0$"):
        load(at(pets, "pets")).train.decode(2, 3)
    faults = [x.fault for x in verify("pets", "tfds", str(pets)) if x.fault]
    assert [fault.partition(" has ")[2] for fault in faults] == [
        "label 1, not one from 0 to 0",  # two to train on and two to test on
    ] * 4


def test_verify_finds_the_damaged_image_in_a_whole_record(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for i in range(4):
        folder = tmp_path / ("train", "val")[i // 2] / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.jpg")
    content = (tmp_path / "train/cat/1.jpg").read_bytes()
    (tmp_path / "train/cat/1.jpg").write_bytes(content[:300])
    monkeypatch.setattr(Encoded, "decode", lambda *_: None)
    prepare(load(at(tmp_path, "pets", "folder")), tmp_path / "to")
    monkeypatch.undo()
    *shards, wrong, train, test = verify("pets", "tfds", str(tmp_path / "to"))
    assert not any(shard.fault for shard in shards)
    assert all("there is no published one" in shard.note for shard in shards)
    assert "train[1]" in wrong.file
    assert "cannot be decoded" in wrong.fault
    assert (train.note, train.verdict) == ("2 images; 1 of them wrong", "")
    assert test.note == "2 images, each decoded, each label one of the classes"


def test_verify_says_that_a_set_of_a_known_size_has_another(prepared, monkeypatch):
    # Such a directory is refused by `load`; the miniature of CIFAR-10 has ten and five images.
    known = dataclasses.replace(DATASETS["cifar10"], num_train=11)
    monkeypatch.setitem(DATASETS, "cifar10", known)
    [wrong] = [x for x in verify("cifar10", "tfds", str(prepared)) if x.fault]
    assert wrong.file.endswith("cifar10/3.0.2: train")
    assert wrong.fault == "10 images, not 11"


def test_verify_names_missing_features(pets):
    (pets / "pets/1.0.0/features.json").unlink()
    [wrong] = [x for x in verify("pets", "tfds", str(pets)) if x.fault]
    assert (wrong.file, wrong.fault) == (str(pets / "pets/1.0.0/features.json"), "missing")


def test_the_fingerprint_is_that_of_the_data_and_not_of_what_lies_beside_them(pets):
    version = pets / "pets/1.0.0"
    before = load(at(pets, "pets")).fingerprint
    for stranger in (".DS_Store", "._pets-train.array_record-00000-of-00001", "notes.txt"):
        (version / stranger).write_bytes(b"x")
    assert load(at(pets, "pets")).fingerprint == before
    with (version / "label.labels.txt").open("a") as file:
        file.write("\n")
    assert load(at(pets, "pets")).fingerprint != before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"fileFormat": "tfrecord"}, "in the format 'tfrecord', which only TensorFlow reads"),
        ({"name": "mnist"}, "holds 'mnist', not 'cifar10'"),
        ({"splits": [{"name": "train", "shardLengths": ["10"]}]}, "it has train"),
        ({"splits": []}, "it has none"),
        ({"splits": 3}, "is damaged: "),
        (
            {"splits": [{"name": "train", "shardLengths": ["9" * 400]}]},
            "split 'train' has no number of examples that can be",
        ),
        ({"splits": [{"name": "test", "shardLengths": [-1]}]}, "split 'test' has no number"),
    ],
)
def test_a_directory_that_cannot_be_read_is_refused_before_anything_else(prepared, damage, message):
    path = prepared / "cifar10/3.0.2/dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError) as caught:
        describe(at(prepared))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_deep_description_is_refused(prepared):
    (prepared / "cifar10/3.0.2/dataset_info.json").write_text('{"splits": ' + "[" * 100_000)
    with pytest.raises(UserError, match=r"dataset_info\.json' is damaged: "):
        describe(at(prepared))


def test_a_path_that_holds_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no cifar10/VERSION/dataset_info\.json; see 'norm"):
        describe(at(tmp_path))
    with pytest.raises(UserError, match=r"does not exist"):
        describe(at(tmp_path / "none"))


def test_verify_names_the_shard(prepared):
    # Two shards, and the images of two splits.
    assert [x.fault for x in verify("cifar10", "tfds", str(prepared))] == [""] * 4
    shard = next((prepared / "cifar10/3.0.2").glob("cifar10-test*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    good, wrong = verify("cifar10", "tfds", str(prepared))
    assert good.fault == ""
    assert wrong.file == str(shard)
    assert wrong.size == len(content) // 2
    assert wrong.fault
    with pytest.raises(UserError, match="cannot be read"):
        load(at(prepared))
    shard.unlink()
    assert [x.fault for x in verify("cifar10", "tfds", str(prepared))] == ["", "missing"]


def test_the_command_prepares_digits(tmp_path, capsys):
    assert main(["data", "prepare", "digits", f"--to={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "digits/1.0.0")
    assert load(at(tmp_path, "digits")).fingerprint == load(data_config()).fingerprint


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prepare", "cifar10"], "the following arguments are required: --to"),
        (["prepare", "cifar10", "--to=x"], "'normlab data prepare' needs --path=PATH"),
        (["prepare", "cifar10", "--to=x", "--path=/nowhere"], "'/nowhere' does not exist"),
        (["prepare", "svhn_cropped", "--to=x", "--path=."], "needs TensorFlow: pip install"),
        (["prepare", "svhn_croped", "--to=x", "--path=."], "did you mean 'svhn_cropped'?"),
        (["prepare", "svhn_cropped", "--to=x", "--path=/nowhere"], "'/nowhere' does not exist"),
        (["prepare", "../x", "--to=x", "--path=."], "a name to prepare has letters, digits"),
        (["prepare", "digits", "--to=/dev/null/x"], "'/dev/null' is not a folder"),
        (["verify", "cifra10", "--path=x", "--source=archive"], "did you mean 'cifar10'?"),
        (["verify", "mnist"], "'normlab data verify' needs --path=PATH"),
        (["verify", "digits"], "data set 'digits' comes with scikit-learn; there is no file"),
        (["verify", "mnist", "--config.seed=1", "--path=x"], "unknown argument '--config.seed'"),
        (["info", "--config=configs/digits.py", "--classes=0"], "--classes=0 must be 1 or more"),
        (["infi"], "invalid choice: 'infi'"),
    ],
)
def test_a_wrong_command_is_one_line(command, message, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["data", *command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error

"""`normlab rerun`: what it warns of, and the folders it refuses."""

import json

import pytest

from normlab import run
from normlab.cli import main
from normlab.cli.rerun import warnings
from normlab.config import load_config
from normlab.training.loop import train

MANIFEST = {
    "git_commit": "abc",
    "git_dirty": False,
    "versions": {"jax": "0.10.2", "pillow": None},
    "environment": {"XLA_FLAGS": "x"},
    "data_fingerprint": "aa",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerun") / "run"
    small = {"model.widths": (2,), "model.strides": (4,), "train.num_steps": 1}
    train(load_config("configs/digits.py", small), folder)
    return folder


def test_nothing_is_said_of_two_processes_that_are_alike():
    assert warnings(MANIFEST, MANIFEST) == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"data_fingerprint": "bb"}, "data_fingerprint was aa, is bb"),
        ({"versions": {"jax": "1", "pillow": None}}, "versions.jax was 0.10.2, is 1"),
        ({"versions": {"jax": "0.10.2", "pillow": "13"}}, "versions.pillow was None, is 13"),
        ({"environment": {}}, "environment.XLA_FLAGS was x, is None"),
        ({"git_dirty": True}, "git_dirty was False, is True"),
    ],
)
def test_each_difference_is_a_line(change, warning):
    assert warnings(MANIFEST, MANIFEST | change) == [warning]


def test_a_version_that_was_not_recorded_is_no_difference():
    now = MANIFEST | {"versions": MANIFEST["versions"] | {"scikit-learn": "1.9"}}
    assert warnings(MANIFEST, now) == []


def test_uncommitted_changes_on_one_commit_cannot_be_compared():
    dirty = MANIFEST | {"git_dirty": True}
    [warning] = warnings(dirty, dirty)
    assert warning == "commit abc, with uncommitted changes, which cannot be compared"
    assert warnings(dirty, dirty | {"git_commit": "abd"}) == ["git_commit was abc, is abd"]


def test_a_manifest_has_the_versions_of_what_decodes_data():
    versions = run.describe_machine()["versions"]
    assert {"pillow", "tensorflow-datasets", "array_record", "scikit-learn"} <= versions.keys()
    assert versions["ml-collections"]


def test_a_folder_in_which_nothing_would_be_trained_is_refused(done, tmp_path, capsys):
    for new in (done, done / "../run"):
        assert main(["rerun", str(done), f"--workdir={new}"]) == 2
        assert "is the folder of the run itself; choose another\n" in capsys.readouterr().err
    (tmp_path / "result.json").write_text((done / "result.json").read_text())
    assert main(["rerun", str(done), f"--workdir={tmp_path}"]) == 2
    assert "holds a finished run; choose another folder\n" in capsys.readouterr().err


def test_a_damaged_manifest_is_one_line(done, tmp_path, capsys):
    manifest = json.loads((done / "manifest.json").read_text())
    (tmp_path / "config.json").write_text((done / "config.json").read_text())
    for section in ("versions", "environment"):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {section: ["jax"]}))
        assert main(["rerun", str(tmp_path), f"--workdir={tmp_path / 'new'}"]) == 2
        error = capsys.readouterr().err
        assert error == f"normlab: {tmp_path}/manifest.json is damaged: {section!r} is no object\n"


def test_other_data_are_said_before_the_training(done, tmp_path, capsys):
    manifest = json.loads((done / "manifest.json").read_text())
    for name in ("config", "result"):
        (tmp_path / f"{name}.json").write_text((done / f"{name}.json").read_text())
    now = manifest["data_fingerprint"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"data_fingerprint": "ab"}))
    assert main(["rerun", str(tmp_path), f"--workdir={tmp_path / 'new'}"]) == 0
    captured = capsys.readouterr()
    assert f"normlab: not as then: data_fingerprint was ab, is {now}\n" in captured.err
    assert "test accuracy " in captured.out

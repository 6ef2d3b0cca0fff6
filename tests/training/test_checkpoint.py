"""Checkpoints: whole or refused, and never deleted unasked."""

import json
import logging
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from normlab.errors import MachineFault, UserError
from normlab.training import checkpoint

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "count": jnp.array(3), "none": None, "empty": {}}
FACTS = {"run": "abc", "seed": 0}


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20):
        state = {**STATE, "count": jnp.array(step)}
        checkpoint.save(tmp_path / "checkpoints", step, state, FACTS)
    return tmp_path / "checkpoints"


def payload(folder, step):
    """The largest file of a checkpoint's state: the one that holds the arrays."""
    files = [path for path in (folder / str(step) / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_the_newest_one_comes_back_with_its_facts(folder):
    step, state, manifest = checkpoint.latest(folder, STATE, FACTS)
    assert (step, int(state["count"]), manifest["run"]) == (20, 20, "abc")
    np.testing.assert_array_equal(state["w"], STATE["w"])
    assert state["none"] is None


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints", STATE, FACTS) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add", "manifest"])
def test_a_damaged_one_is_kept_named_and_passed_over(folder, damage, caplog):
    path = payload(folder, 20)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "remove":
        path.unlink()
    elif damage == "add":
        (path.parent / "stranger").write_text("x")
    else:
        (folder / "20" / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        step, state, _ = checkpoint.latest(folder, STATE, FACTS)
    assert (step, int(state["count"])) == (10, 10)
    assert f"{folder / '20'}" in caplog.text
    assert (folder / "20").is_dir()
    with pytest.raises(UserError):
        checkpoint.load(folder / "20", STATE, FACTS)
    # When the run gets there again, the bad one is moved aside, not deleted.
    checkpoint.save(folder, 20, STATE, FACTS)
    assert (folder / "bad-20-1").is_dir()
    assert checkpoint.latest(folder, STATE, FACTS)[0] == 20


def test_another_runs_checkpoint_is_refused(folder):
    with pytest.raises(UserError, match="of another run: run is 'abc'"):
        checkpoint.load(folder / "20", STATE, {"run": "xyz"})


@pytest.mark.parametrize(
    "like",
    [
        {**STATE, "w": jnp.zeros((3, 3))},
        {"w": STATE["w"]},
        {**STATE, "more": jnp.zeros(1)},
    ],
    ids=["shape", "fewer", "more"],
)
def test_another_models_checkpoint_is_refused_in_one_line(folder, like):
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder / "20", like, FACTS)
    assert "\n" not in str(caught.value)


def test_a_half_written_one_does_not_count(folder):
    (folder / "20").rename(folder / ".writing-30-1")
    assert checkpoint.steps(folder) == [10]


def test_all_are_kept_unless_a_number_is_given(folder):
    checkpoint.keep_newest(folder, None)
    assert checkpoint.steps(folder) == [10, 20]
    checkpoint.keep_newest(folder, 1)
    assert checkpoint.steps(folder) == [20]


def test_the_manifest_lists_every_file_with_its_digest(folder):
    manifest = json.loads((folder / "20" / "manifest.json").read_text())
    files = [path for path in (folder / "20" / "state").rglob("*") if path.is_file()]
    assert len(manifest["files"]) == len(files)
    assert all(len(digest) == 64 for digest in manifest["files"].values())


def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(tmp_path, monkeypatch):
    state = {"w": jnp.zeros(1000)}
    checkpoint.save(tmp_path, 1, state, {})
    # Room for 4,000 bytes of values, but not for the index beside them.
    usage = SimpleNamespace(free=5_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MachineFault, match="no space left on device for a checkpoint in"):
        checkpoint.save(tmp_path, 2, state, {})
    assert checkpoint.steps(tmp_path) == [1]

"""Files that are cut off, altered, lost, or of something else: refused by name, or done without."""

import json
import random
import shutil

import pytest
from fault_tools import (
    arguments,
    assert_same_run,
    command,
    final_state,
    payload,
    small,
)

from normlab import config as configs
from normlab import run
from normlab.errors import UserError
from normlab.training import checkpoint
from normlab.training.loop import train
from normlab.training.restore import restore
from normlab.training.setup import build_parts, run_identity
from normlab.training.state import abstract_state


def unfinish(folder, step):
    """Leaves of a finished run what it was just after the checkpoint of `step`, and a bit more."""
    (folder / "result.json").unlink()
    for later in checkpoint.steps(folder / "checkpoints"):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / str(later))


def flip(path, place, bit=0):
    """Flips a bit of the byte at `place`, or at that part of the file, for a float."""
    content = bytearray(path.read_bytes())
    place = int(place * len(content)) if isinstance(place, float) else place
    content[place] ^= 1 << bit
    path.write_bytes(content)


def cut(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])


# Checkpoints


def test_no_flipped_bit_of_a_manifest_is_taken_for_what_was_written(own):
    """Sizes and digests of the logs stand in it: an altered one would cut the logs elsewhere."""
    folder = own / "checkpoints" / "8"
    path = folder / "manifest.json"
    written = path.read_bytes()
    there = run.read_json(path)
    generator = random.Random(0)
    del there["digest"]
    refused = []
    places = range(0, len(written), 3)
    for place in places:
        path.write_bytes(written)
        flip(path, place, generator.randrange(8))
        try:
            manifest = checkpoint._manifest(folder)
        except UserError as error:
            refused.append(str(error))
        else:
            assert manifest == there  # space between the words of JSON may become other space
    assert len(refused) > 0.95 * len(places)
    assert not any("\n" in message for message in refused)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_payload_is_passed_over_and_the_run_ends_the_same(
    own, whole, damage, part, caplog
):
    unfinish(own, 8)
    (flip if damage == "flip" else cut)(payload(own / "checkpoints" / "8"), part)
    like = abstract_state(build_parts(small()))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(own / "checkpoints" / "8", like)
    if part == 0.5:
        train(small(), own)
        assert "checkpoint" in caplog.text
        assert "resumed at step 4" in (own / "log.txt").read_text()
        assert_same_run(own, whole, small())
        assert (own / "checkpoints" / "bad-8-1").is_dir()


@pytest.mark.parametrize(
    ("norm", "fields"),
    [("layer_norm", {}), ("batch_norm", {"model__widths": (4, 6)}), ("batch_norm", {"seed": 1})],
    ids=["another normalizer", "another model", "another seed"],
)
def test_a_checkpoint_of_another_run_is_passed_over(own, whole, tmp_path, norm, fields, caplog):
    other = tmp_path / "other"
    train(small(norm, train__num_steps=8, **fields), other)
    unfinish(own, 4)
    shutil.copytree(other / "checkpoints" / "8", own / "checkpoints" / "8")
    train(small(), own)
    assert "is of another run" in caplog.text
    assert_same_run(own, whole, small())


@pytest.mark.parametrize("format", [checkpoint.FORMAT + 1, 10**400])
def test_a_checkpoint_of_a_later_format_says_who_reads_it(own, format):
    path = own / "checkpoints" / "12" / "manifest.json"
    run.write_json(path, run.read_json(path) | {"format": format})
    with pytest.raises(UserError, match="use the normlab that wrote it, or a later one"):
        restore(own, 12)
    assert restore(own, None)[1] == 8


def test_a_checkpoint_without_a_digest_of_its_own_is_read(own):
    """As those are that were written before manifests had one."""
    path = own / "checkpoints" / "12" / "manifest.json"
    manifest = run.read_json(path)
    for name in ("format", "digest", "log_digest"):
        del manifest[name]
    run.write_json(path, manifest)
    assert restore(own, 12)[1] == 12
    for name in ("files", "form"):
        run.write_json(path, manifest | {name: [1]})
        with pytest.raises(UserError, match="its manifest is not what was written"):
            restore(own, 12)


def test_what_a_killed_process_had_begun_is_cleared_away(own, whole):
    unfinish(own, 8)
    (own / "checkpoints" / ".writing-12-4711" / "state").mkdir(parents=True)
    train(small(), own)
    assert checkpoint.steps(own / "checkpoints") == [4, 8, 12]
    assert not list((own / "checkpoints").glob(".*"))
    assert_same_run(own, whole, small())


# The logs


@pytest.mark.parametrize("damage", ["flipped", "cut off", "lost", "another's"])
def test_metrics_that_are_not_what_was_written_are_written_again(own, whole, damage, caplog):
    """Going on behind a damaged line would end with other bytes than the undisturbed run's."""
    unfinish(own, 8)
    path = own / "metrics.jsonl"
    if damage == "flipped":
        flip(path, 20)
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:30])
    elif damage == "lost":
        path.unlink()
    else:
        path.write_text(json.dumps({"step": 5, "split": "train", "loss": 0.0}) * 20)
    train(small(), own)
    # The first line, of step 5, stands before the checkpoint of step 8 and after that of step 4.
    assert "metrics.jsonl up to there is not what was written" in caplog.text
    assert "resumed at step 4" in (own / "log.txt").read_text()
    assert_same_run(own, whole, small())


def test_seconds_that_were_lost_cost_no_result(own, whole):
    """After the last step nothing is left to be timed."""
    unfinish(own, 12)
    (own / "timing.jsonl").unlink()
    result = train(small(), own)
    assert result["examples_per_second"] is None
    assert result["test_loss"] == json.loads((whole / "result.json").read_text())["test_loss"]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "x", "seconds": [1], "train_seconds": null}',
        '{"step": -1, "seconds": -5.0, "train_seconds": NaN, "compile_seconds": 1e999}',
        f'{{"seconds": {"9" * 400}, "train_seconds": {"9" * 5000}}}',
        "[" * 100_000,
        "\ufffe",
    ],
    ids=["types", "signs", "sizes", "depth", "no JSON"],
)
def test_seconds_of_another_format_are_none(own, whole, line):
    unfinish(own, 8)
    path = own / "timing.jsonl"
    path.write_text(line + "\n")
    for name in ("4", "8"):
        manifest = own / "checkpoints" / name / "manifest.json"
        mark = {**run.read_json(manifest)["log_bytes"], "timing.jsonl": path.stat().st_size}
        facts = {"format": 1} | run.read_json(manifest) | {"log_bytes": mark}
        del facts["digest"]
        run.write_json(manifest, facts | {"digest": checkpoint._own_digest(facts)})
    result = train(small(), own)
    assert 0 < result["seconds"] < 1000
    assert 0 < result["step_seconds"] < 1000
    assert_same_run(own, whole, small())


# Config, identity, manifest


@pytest.mark.parametrize("content", ["", '{"schema_version": 1, "tr', "\x00\x00"])
def test_a_damaged_config_is_refused_and_made_again_by_its_run(own, whole, content, capsys):
    path = own / "config.json"
    path.write_text(content)
    code, errors = command(["eval", str(own)], capsys)
    assert (code, len(errors)) == (2, 1)
    assert f"{path} is not JSON" in errors[0]
    unfinish(own, 8)
    train(small(), own)
    assert_same_run(own, whole, small())


def test_no_flipped_bit_of_a_config_changes_what_is_evaluated(own):
    """It is refused, unless it lies in what changes no result, such as how often a line is logged.

    All 20,000 bits would take minutes: a sample.
    """
    path = own / "config.json"
    before = path.read_bytes()
    then = run_identity(restore(own, None)[0].config)
    generator = random.Random(1)
    refused = []
    for _ in range(150):
        path.write_bytes(before)
        flip(path, generator.random(), generator.randrange(8))
        try:
            parts, _, _ = restore(own, None)
        except UserError as error:
            refused.append(str(error))
        else:
            assert run_identity(parts.config) == then
    assert len(refused) > 100
    assert not any("\n" in message for message in refused)
    # One that would load: 64 becomes 65.
    path.write_bytes(before.replace(b'"batch_size": 64', b'"batch_size": 65'))
    with pytest.raises(UserError, match=r"train\.batch_size is 65 in the one and 64 in the other"):
        restore(own, None)


@pytest.mark.parametrize("name", ["identity", "manifest", "result"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_cut_off_file_of_a_run_is_named_and_kept(own, name, content, capsys):
    unfinish(own, 8)
    path = own / f"{name}.json"
    path.write_text(content)
    code, errors = command(arguments(own), capsys)
    assert (code, len(errors)) == (2, 1)
    assert f"{path} is not" in errors[0]
    assert path.read_text() == content


def test_a_manifest_whose_later_part_is_damaged_is_named(own, capsys):
    unfinish(own, 8)
    path = own / "manifest.json"
    for resumed in (3, [], [1]):
        run.write_json(path, run.read_json(path) | {"resumed": resumed})
        code, errors = command(arguments(own), capsys)
        if resumed == []:
            assert code == 0
            (own / "result.json").unlink()
        else:
            assert (code, len(errors)) == (2, 1)
            assert "'resumed' is no list of objects" in errors[0]


def test_a_run_of_another_schema_is_refused(own, monkeypatch, capsys):
    code, errors = command(["eval", str(own)], capsys)
    assert (code, errors) == (0, [])
    monkeypatch.setattr(configs, "SCHEMA_VERSION", 2)
    code, errors = command(["eval", str(own)], capsys)
    assert (code, errors) == (2, ["normlab: config.json has schema version 1, this normlab 2"])
    code, errors = command(arguments(own), capsys)
    assert (code, len(errors)) == (2, 1)
    assert "schema_version is 1 there and 2 here" in errors[0]


def test_a_config_of_a_later_normlab_names_the_field_that_is_not_known(own, capsys):
    path = own / "config.json"
    saved = run.read_json(path)
    saved["train"]["batch_sizes"] = 64
    run.write_json(path, saved)
    code, errors = command(["eval", str(own)], capsys)
    assert code == 2
    assert errors == [
        "normlab: unknown config field 'train.batch_sizes'; did you mean 'train.batch_size'?"
    ]


def test_the_whole_run_is_as_it_was(whole):
    """What the tests of this file compare with: nobody wrote it."""
    assert final_state(whole, small())[0] == 12

"""The run folder's files: atomic, bounded by checkpoints, readable by strangers."""

import json

import pytest

from normlab import run
from normlab.errors import UserError


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    run.write_json(path, {"x": 1})
    with pytest.raises(ValueError):
        run.write_json(path, {"x": float("nan")})
    assert run.read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_number_that_is_not_finite_becomes_null(tmp_path):
    run.append_line(tmp_path / "m.jsonl", {"loss": float("inf"), "step": 1})
    assert (tmp_path / "m.jsonl").read_text() == '{"loss": null, "step": 1}\n'


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": ' * 100_000])
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as caught:
        run.read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    assert run.read_json(tmp_path / "absent.json") is None


def test_logs_are_cut_back_to_a_checkpoints_size(tmp_path):
    for step in (1, 2):
        run.append_line(tmp_path / "metrics.jsonl", {"step": step, "split": "train", "loss": step})
    sizes = run.log_bytes(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "tr')  # cut off in the middle
    run.truncate_logs(tmp_path, sizes)
    assert [line["step"] for line in run.read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert run.last_train_loss(tmp_path) == 2
    run.truncate_logs(tmp_path, {})
    assert run.read_lines(tmp_path / "metrics.jsonl") == []


def test_the_first_difference_is_named_by_its_path():
    a, b = {"x": 1, "s": {"y": 2, "z": 3}}, {"x": 1, "s": {"y": 2, "z": 4}}
    assert run.first_difference(a, b) == ("s.z", 3, 4)
    assert run.first_difference(a, a) is None
    assert run.first_difference({}, {"x": 1}) == ("x", None, 1)


def test_the_manifest_names_versions_threads_and_commit():
    machine = run.describe_machine()
    assert machine["versions"]["jax"]
    assert machine["threads"] >= 1
    assert machine["git_commit"] is None or len(machine["git_commit"]) == 40
    json.dumps(machine)


def test_a_failure_leaves_its_reason(tmp_path):
    def fail():
        with run.failure_noted(tmp_path):
            raise RuntimeError("first line\nsecond line")

    with pytest.raises(RuntimeError):
        fail()
    status = run.read_json(tmp_path / "status.json")
    assert (status["status"], status["message"]) == ("failed", "first line")


@pytest.mark.parametrize("status", [None, "{", '{"status": "running"}', '{"status": "done"}'])
def test_a_result_decides_what_state_a_run_is_in(tmp_path, status):
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    culprit = {"diverged_metric": "loss", "diverged_step": 31}
    result = {"status": "diverged", "steps": 40, "test_accuracy": None, **culprit}
    run.write_json(tmp_path / "result.json", result)
    assert run.read_status(tmp_path) == "diverged"
    run.note_result(tmp_path, result)
    assert run.read_json(tmp_path / "status.json") == {
        "status": "diverged",
        "step": 40,
        "message": "loss not finite from step 31",
    }


def test_a_status_that_agrees_with_the_result_is_left(tmp_path):
    run.write_status(tmp_path, "diverged", 40, "its own words")
    run.note_result(tmp_path, {"status": "diverged", "steps": 40})
    assert run.read_json(tmp_path / "status.json")["message"] == "its own words"

"""The same command twice, and what a manifest promises of it."""

import json
import os

import pytest
from fault_tools import arguments, assert_same_run, command, small, start

from normlab import cli, environment
from normlab.environment import (
    DETERMINISTIC_FLAGS,
    check_deterministic,
    determinism,
    entry_environment,
    is_deterministic,
)
from normlab.errors import UserError
from normlab.training.loop import train

ALL = " ".join(DETERMINISTIC_FLAGS)


# The same bytes


def test_the_same_run_twice_in_one_process_gives_the_same_bytes(whole, tmp_path):
    train(small(), tmp_path / "again")
    assert_same_run(tmp_path / "again", whole, small())


@pytest.mark.slow  # two processes
def test_the_same_command_twice_gives_the_same_bytes(tmp_path):
    fields = {"train__num_steps": 100, "log__every_steps": 10, "eval__every_steps": 20}
    for name in ("one", "two"):
        process = start([*arguments(tmp_path / name, **fields), "--deterministic"])
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
    assert_same_run(tmp_path / "one", tmp_path / "two", small(**fields))
    manifests = [json.loads((tmp_path / x / "manifest.json").read_text()) for x in ("one", "two")]
    for manifest in manifests:
        assert set(DETERMINISTIC_FLAGS) <= set(manifest["environment"]["XLA_FLAGS"].split())
        assert manifest["deterministic"]["flags"] is True
        manifest.pop("started")
    assert manifests[0] == manifests[1]


@pytest.mark.slow  # a sweep with a worker process
def test_the_workers_of_a_sweep_inherit_the_flags(tmp_path):
    words = ["compare", "configs/digits.py", "--norms=none", "--seeds=1", "--deterministic"]
    words += [f"--workdir={tmp_path / 'sweep'}", "--config.train.num_steps=2"]
    process = start([*words, "--config.model.widths=2", "--config.model.strides=4"])
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    [path] = (tmp_path / "sweep").glob("*/manifest.json")
    assert json.loads(path.read_text())["deterministic"]["flags"] is True


# The flags


def test_the_flags_are_added_to_what_there_is_and_never_twice():
    extra = entry_environment({"XLA_FLAGS": "--xla_foo=1"}, deterministic=True)
    flags = extra["XLA_FLAGS"].split()
    assert flags[0] == "--xla_foo=1"
    assert set(DETERMINISTIC_FLAGS) <= set(flags)
    assert is_deterministic(extra)
    again = entry_environment({**extra, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, True)
    assert again == {}
    assert not is_deterministic(entry_environment({}))


def test_a_flag_that_the_user_set_otherwise_is_kept_and_the_command_refused(monkeypatch):
    contrary = DETERMINISTIC_FLAGS[0].replace("true", "false")
    extra = entry_environment({"XLA_FLAGS": contrary}, deterministic=True)
    assert extra["XLA_FLAGS"].split()[0] == contrary
    monkeypatch.setenv("XLA_FLAGS", extra["XLA_FLAGS"])
    with pytest.raises(UserError, match=f"--deterministic needs .* which is '{contrary}"):
        check_deterministic()
    monkeypatch.setenv("XLA_FLAGS", ALL)
    check_deterministic()


@pytest.mark.parametrize("word", ["--deterministic", "--det"])
@pytest.mark.parametrize("name", ["train", "compare", "sweep", "paper", "rerun"])
def test_they_stand_before_python_starts(monkeypatch, name, word):
    """`entry` starts the command again: JAX reads its flags once, when it is first used."""
    started = []

    class Started(Exception):
        pass

    def execve(program, words, variables):
        started.append(variables)
        raise Started

    monkeypatch.setattr(environment.os, "execve", execve)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.delenv("NORMLAB_ENTRY", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    for words, expected in (([word], True), ([], False)):
        monkeypatch.setattr(cli.sys, "argv", ["normlab", name, *words])
        with pytest.raises(Started):
            cli.entry()
        assert is_deterministic(started.pop()) is expected


def test_a_command_whose_process_has_not_the_flags_says_so(tmp_path, monkeypatch, capsys):
    """In a notebook, or where a program of normlab starts another one."""
    monkeypatch.setenv("XLA_FLAGS", "")
    code, errors = command([*arguments(tmp_path / "run"), "--deterministic"], capsys)
    assert (code, len(errors)) == (2, 1)
    assert f"--deterministic needs XLA_FLAGS='{ALL}' before Python starts" in errors[0]
    assert not (tmp_path / "run").exists()


# The promise


@pytest.mark.parametrize(
    ("platform", "devices", "flags", "promised"),
    [
        ("cpu", 1, False, True),
        ("cpu", 8, False, True),
        ("gpu", 1, False, False),
        ("gpu", 1, True, True),
        ("gpu", 8, True, False),
        ("tpu", 4, False, False),
    ],
)
def test_the_manifest_says_what_is_promised_and_what_could_not_be(
    monkeypatch, platform, devices, flags, promised
):
    monkeypatch.setenv("XLA_FLAGS", ALL if flags else "")
    found = determinism(platform, devices)
    assert found["flags"] is flags
    assert found["promised"] == ("the same bytes from the same command" if promised else "nothing")
    reasons = found["not_promised"]
    assert f"another number of devices than {devices}" in reasons
    assert "another kind of device" in reasons
    assert any("versions" in reason for reason in reasons)
    assert any("threads" in reason for reason in reasons) == (platform == "cpu")
    assert any("--deterministic is not set" in reason for reason in reasons) == (
        platform == "gpu" and not flags
    )
    assert any("tried" in reason for reason in reasons) == (platform == "tpu")


def test_a_run_on_a_cpu_promises_its_bytes_for_its_number_of_threads(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    found = manifest["deterministic"]
    assert found["promised"] == "the same bytes from the same command"
    assert f"another number of threads than {manifest['threads']}" in found["not_promised"]
    assert found["flags"] is is_deterministic(os.environ)

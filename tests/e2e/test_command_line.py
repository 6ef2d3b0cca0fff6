"""The front door: commands as typed, and every mistake as one line with exit code 2."""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from normlab.cli import COMMANDS, main

TINY = [
    "--config.model.widths=(4,)",
    "--config.model.strides=(2,)",
    "--config.train.num_steps=3",
]


def normlab(*arguments, timeout=120):
    command = [sys.executable, "-m", "normlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def mistake(*arguments):
    """Runs a command that must fail as a mistake, in this process; returns its one line."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as error:
        code = main([*map(str, arguments)])
    assert code == 2, error.getvalue()
    assert_one_line(out.getvalue(), error.getvalue())
    return error.getvalue()


def assert_one_line(out, error):
    assert error.startswith("normlab: ")
    assert error.count("\n") == 1, error
    assert out == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    command = ["train", "--config=configs/digits.py:norm=layer_norm", f"--workdir={folder}", *TINY]
    return folder, normlab(*command), command


def test_help_is_quick():
    fastest = min(_seconds("--help") for _ in range(3))
    assert fastest < 0.5
    finished = normlab("--help")
    assert finished.returncode == 0
    for name in COMMANDS:
        assert name in finished.stdout


def _seconds(*arguments):
    start = time.perf_counter()
    normlab(*arguments)
    return time.perf_counter() - start


def test_train_prints_its_result_and_resumes(trained):
    folder, finished, command = trained
    assert finished.returncode == 0, finished.stderr
    assert "step 3/3" in finished.stdout
    assert f"in {folder}" in finished.stdout
    again = normlab(*command)
    assert again.returncode == 0
    assert "step 3/3" not in again.stdout  # nothing was trained


def test_train_and_eval_agree(trained):
    folder, _, _ = trained
    finished = normlab("eval", folder)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((folder / "result.json").read_text())
    printed = dict(line.split() for line in finished.stdout.splitlines())
    assert float(printed["test_accuracy"]) == pytest.approx(result["test_accuracy"], rel=1e-5)


def test_status_and_report_take_a_single_run(trained):
    folder, _, _ = trained
    assert "1 done" in normlab("status", folder).stdout
    finished = normlab("report", folder)
    assert finished.returncode == 0, finished.stderr
    assert (folder / "report.html").exists()


def test_a_diverged_run_exits_with_3(tmp_path):
    finished = normlab(
        "train",
        "--config=configs/digits.py:norm=none",
        f"--workdir={tmp_path / 'run'}",
        *TINY[:2],
        "--config.train.num_steps=30",
        "--config.optim.base_lr=1e30",
    )
    assert finished.returncode == 3
    assert "diverged" in finished.stdout


@pytest.mark.commands
def test_compare_ends_with_the_table_and_the_paths(tmp_path):
    folder = tmp_path / "comparison"
    command = (
        "compare",
        "configs/digits.py",
        "--norms=none,batch_norm",
        "--seeds=2",
        "--setting=base:",
        "--setting=fast:optim.base_lr=0.5",
        f"--workdir={folder}",
        *TINY,
    )
    finished = normlab(*command)
    assert finished.returncode == 0, finished.stderr
    assert "[8/8]" in finished.stdout
    assert "left" in finished.stdout
    for name in ("report.html", "report.md", "report.csv"):
        assert str(folder / name) in finished.stdout
        assert (folder / name).exists()
    before = {name: (folder / name).read_bytes() for name in ("report.html", "report.csv")}
    again = normlab(*command)
    assert again.returncode == 0
    assert "[8/8]" not in again.stdout
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert "8 done" in normlab("status", folder).stdout


def test_inspect_shows_fields_meanings_parameters_and_layers():
    finished = normlab("inspect", "--config=configs/cifar10.py:norm=group_norm")
    assert finished.returncode == 0, finished.stderr
    assert "269,722 parameters" in finished.stdout
    assert "peak learning rate" in finished.stdout
    assert "norm.num_groups" in finished.stdout
    assert "num_groups 32 does not divide 16 channels: 16 groups" in finished.stdout
    assert "40,551,040 multiply-accumulates an image; XLA counts " in finished.stdout
    # 269,722 · 4 bytes / 2²⁰.
    assert re.search(r"^memory of .* MiB\nparameters +1\.03\n", finished.stdout, re.MULTILINE)
    assert "From shapes alone" in finished.stdout.splitlines()[-1]


def test_inspect_shows_what_two_configs_differ_in():
    config = "configs/digits.py"
    finished = normlab("inspect", f"--config={config}", f"--against={config}")
    assert finished.stdout == "the same in every field\n"
    finished = normlab(
        "inspect", f"--config={config}", f"--against={config}", "--config.optim.base_lr=0.5"
    )
    header, line = finished.stdout.splitlines()
    assert header.split() == ["field", config, config]
    assert line.split() == ["optim.base_lr", "0.1", "0.5"]


def test_a_run_is_made_once_more_from_its_folder(trained, tmp_path):
    folder, _, _ = trained
    finished = normlab("rerun", folder, f"--workdir={tmp_path / 'again'}")
    assert finished.returncode == 0, finished.stderr
    first, again = (path / "metrics.jsonl" for path in (folder, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()
    accuracy = json.loads((folder / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy} then, {accuracy} now" in finished.stdout


def test_a_rerun_says_what_is_not_as_it_was(trained, tmp_path):
    folder, _, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["versions"]["jax"] = "0.0.1"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    finished = normlab("rerun", copy, f"--workdir={tmp_path / 'again'}")
    assert finished.returncode == 0
    assert "normlab: not as then: versions.jax was 0.0.1, is " in finished.stderr
    assert "no config.json" in mistake("rerun", tmp_path, f"--workdir={tmp_path / 'x'}")


@pytest.mark.parametrize("kind", ["norms", "models", "convs", "optimizers", "data"])
def test_list(kind):
    finished = normlab("list", kind)
    assert finished.returncode == 0
    assert finished.stdout.strip()


# Mistakes

CONFIG = "--config=configs/digits.py"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        ([], "COMMAND"),
        (["train", CONFIG], "--workdir"),
        (["train", "--workdir=x"], "--config"),
        (["train", CONFIG, "--workdir=x", "--cofig.seed=1"], "unknown argument '--cofig.seed'"),
        (["train", CONFIG, "--workdir=x", "--config.sed=1"], "did you mean 'seed'?"),
        (["train", CONFIG, "--workdir=x", "--config.seed=a"], "takes an int, not 'a'"),
        (["train", CONFIG, "--workdir=x", "--config.seed=1", "--config.seed=2"], "given twice"),
        (["train", f"{CONFIG}:norm=bachnorm", "--workdir=x"], "did you mean 'batch_norm'?"),
        (["train", f"{CONFIG}:model=ccn", "--workdir=x"], "did you mean 'cnn'?"),
        (["train", CONFIG, "--workdir=x", "--config.data.name=digit"], "did you mean 'digits'?"),
        (["train", CONFIG, "--workdir=x", "--config.data.source=tar"], "unknown 'data.source'"),
        (
            [
                "train",
                CONFIG,
                "--workdir=x",
                "--config.batch_stats.scope=ghost",
                "--config.batch_stats.ghost_size=48",
            ],
            "'batch_stats.ghost_size' = 48 does not divide the batch of 64; nearest: ",
        ),
        (["train", CONFIG, "--workdir=x", "--config.batch_stats.scope=gost"], "batch_stats.scope"),
        (["train", CONFIG, "--workdir=x", "--config.train.batch_size=5000"], "from 1 to 1437"),
        (["train", f"{CONFIG}:model=lenet5", "--workdir=x"], "model 'lenet5' cannot take"),
        (["train", CONFIG, "--workdir=x", "--config.model.dtype=float99"], "float99"),
        (["train", "--config=configs/cifar10.py", "--workdir=x"], "data.path"),
        (
            ["train", "--config=configs/mnist.py", "--workdir=x", "--config.data.path=/nowhere"],
            "'/nowhere'",
        ),
        (["compare", "configs/digits.py", "--norms=none", "--workdir=x", "--seeds=0"], "--seeds=0"),
        (["compare", "configs/digits.py", "--norms=nonne", "--workdir=x"], "did you mean 'none'"),
        (
            ["compare", "configs/digits.py", "--norms=none", "--workdir=x", "--setting=a:b"],
            "'b' is not field=value",
        ),
        (["eval", "/nowhere"], "not a run folder"),
        (["report", "/nowhere"], "does not exist"),
        (["status", "/nowhere"], "does not exist"),
        (["watch", "/nowhere"], "does not exist"),
        (["watch", "configs"], "folder 'configs' holds no run"),
        (["watch", "configs", "--every=0"], "--every=0 must be seconds above 0"),
        (["watch", "configs", "--once=1"], "--once"),
        (["inspect", "--config=configs/digit.py"], "did you mean 'configs/digits.py'?"),
        (["list", "normz"], "normz"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected):
    assert expected in mistake(*arguments)


def test_a_mistake_ends_the_process_with_2():
    finished = normlab("train", CONFIG, "--workdir=x", "--config.sed=1")
    assert finished.returncode == 2
    assert_one_line(finished.stdout, finished.stderr)


def test_a_platform_that_is_none_is_a_mistake(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpuu")
    finished = normlab("train", CONFIG, "--workdir=x")
    assert finished.returncode == 2
    assert_one_line(finished.stdout, finished.stderr)
    assert "JAX finds no devices: Unable to initialize backend 'tpuu'" in finished.stderr


def test_an_unwritable_workdir_and_another_configs_workdir(trained, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in mistake("train", CONFIG, f"--workdir={tmp_path / 'file' / 'x'}")
    folder, _, _ = trained
    line = mistake("train", CONFIG, f"--workdir={folder}", *TINY)
    assert "holds the run of another config" in line
    assert "layer_norm" in line


def test_a_truncated_archive_is_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        (folder / name).write_bytes(b"\0" * 1000)
    line = mistake(
        "train",
        "--config=configs/cifar10.py",
        f"--config.data.path={folder}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert "data_batch_1.bin" in line
    assert "1,000" in line

"""Every command and snippet of the README is run, in smaller form where it would take long."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = [
    "--config.model.widths=(4,)",
    "--config.model.strides=(2,)",
    "--config.train.num_steps=2",
    "--config.eval.batch_size=10000",
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    return [line for block in blocks("sh") for line in block.splitlines()]


def smaller(words):
    """The same command on a net of one layer and for two steps."""
    if words[1] == "sweep":
        return [*words, "--seeds=2", "--config.train.num_steps=10"]
    if words[1] == "probe":
        return [*words, "--seeds=1", "--config.model.stage_sizes=(1,)", "--config.model.width=4"]
    if words[1] not in ("train", "compare"):
        return words
    if any("model=nf_resnet20" in word for word in words):
        return [*words, "--config.model.stage_sizes=(1,)", "--config.model.width=4", SMALLER[2]]
    kept = [word for word in words if "num_epochs" not in word]
    kept = [word.replace("cifar10.py", "cifar10.py:model=cnn") for word in kept]
    return [*kept, *SMALLER]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with configs/ where the commands run, one after another, as they are typed."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    archive = folder / "cifar-10-batches-bin"
    archive.mkdir()
    black = bytearray(10_000 * 3_073)
    black[::3_073] = bytes(range(10)) * 1_000  # the labels
    for name in [*(f"data_batch_{part}.bin" for part in range(1, 6)), "test_batch.bin"]:
        (archive / name).write_bytes(black)
    return folder


def test_there_is_nothing_in_the_readme_that_these_tests_do_not_know():
    known = {"make", "normlab", "source"}
    assert {shlex.split(line)[0] for line in commands()} == known
    assert len(blocks("sh")) == README.count("```sh")


def test_the_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in commands():
        if line.startswith("make "):
            assert line.split()[1] in targets


@pytest.mark.commands
def test_the_commands(checkout):
    """In one test, in the README's order: some look at what others made."""
    for line in commands():
        words = shlex.split(line)
        if words[0] != "normlab":
            continue
        # The archive of the test is unpacked, and of black images, which no checksum would match.
        words = [word.replace("cifar-10-binary.tar.gz", "cifar-10-batches-bin") for word in words]
        ended = subprocess.run(
            [sys.executable, "-m", "normlab", *smaller(words)[1:]],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == (2 if words[1:3] == ["data", "verify"] else 0), ended.stderr
        assert ended.stdout.strip(), line


@pytest.mark.commands
def test_the_demo(tmp_path):
    """The command of `make demo` with one seed and small nets: 14 runs of the 42."""
    dry = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "--assume-old=.venv/installed", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    text = dry.stdout[dry.stdout.index("normlab compare") :].replace("\\\n", " ")
    words = [word for word in shlex.split(text) if "--workdir" not in word]
    assert "--seeds=3" in words
    words += ["--seeds=1", f"--workdir={tmp_path / 'demo'}", *SMALLER]
    ended = subprocess.run(
        [sys.executable, "-m", "normlab", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "6 normalizers in 3 settings, 1 seed each: 14 runs" in ended.stdout
    for name in ("report.html", "report.md", "report.csv"):
        assert (tmp_path / "demo" / name).exists()


@pytest.mark.commands
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_snippets(checkout, number):
    snippet = blocks("python")[number]
    ended = subprocess.run(
        [sys.executable, "-c", snippet], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_the_experiment_in_the_docs_loads_and_plans(tmp_path):
    from normlab.experiment import load_experiment
    from normlab.sweep import make_plan

    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    [source] = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "shown.py").write_text(source)
    _, experiment = load_experiment(str(tmp_path / "shown.py"))
    scale = experiment.at("smoke")
    plan = make_plan(scale.config, scale.sweep, seeds=[0], overrides=scale.overrides)
    # 2 normalizers at 2 sizes, where GroupNorm's two are one run.
    assert len({planned.id for planned in plan.runs}) == 3

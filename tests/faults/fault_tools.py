"""A run of a few steps, started in the ways in which users start it, and what it left."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from normlab.cli import main
from normlab.config import load_config
from normlab.training import checkpoint
from normlab.training.setup import build_parts
from normlab.training.state import abstract_state

SMALL = {
    "model.widths": (4, 8),
    "model.strides": (2, 2),
    "train.num_steps": 12,
    "log.every_steps": 5,
    "eval.every_steps": 6,
    "checkpoint.every_steps": 4,
}


def small(norm="batch_norm", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(f"configs/digits.py:norm={norm}", SMALL | names)


def arguments(folder, norm="batch_norm", **fields):
    """The words of the command that trains what `small` describes."""
    names = SMALL | {name.replace("__", "."): value for name, value in fields.items()}
    words = ["train", f"--config=configs/digits.py:norm={norm}", f"--workdir={folder}"]
    return words + [f"--config.{name}={value}" for name, value in names.items()]


def command(words, capsys):
    """Runs a command in this process; returns its exit code and the lines on stderr."""
    capsys.readouterr()
    logger = logging.getLogger("normlab")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers = []  # `main` adds one, of the stderr that there is now
    try:
        code = main(words)
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    return code, capsys.readouterr().err.splitlines()


def start(words, *, script=None, entered_by=()):
    """Starts a command, or a script with such words, as a process of its own with one thread."""
    program = [script] if script else ["-m", "normlab"]
    return subprocess.Popen(
        [*entered_by, sys.executable, *program, *map(str, words)],
        env={**os.environ, "NPROC": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def final_state(folder, config):
    """The newest good checkpoint: its step and the bytes of each array, by place."""
    like = abstract_state(build_parts(config))
    step, state, _ = checkpoint.latest(folder / "checkpoints", like, {})
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return step, {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def assert_same_run(one, other, config):
    """What two folders hold of one run is the same to the byte, seconds and memory apart."""
    for name in ("metrics.jsonl", "config.json", "identity.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert final_state(one, config) == final_state(other, config)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    measured = ("seconds", "compile_seconds", "step_seconds", "examples_per_second")
    # Of the process that ended the run, which may have taken no step itself.
    memory = ("peak_memory_bytes", "step_memory_bytes")
    for result in results:
        for name in (*measured, *memory):
            del result[name]
    assert results[0] == results[1]


def payload(folder: Path) -> Path:
    """The largest file of a checkpoint's state: the one that holds the arrays."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)

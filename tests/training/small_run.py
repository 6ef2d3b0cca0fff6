"""A run of a few steps of a net of two layers, and what it wrote."""

import json

import jax
import numpy as np
import pytest

from normlab.config import load_config
from normlab.training import checkpoint, parallel
from normlab.training.setup import build_parts
from normlab.training.state import create_state

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


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def final_parameters(folder, config):
    state = create_state(build_parts(config), parallel.Compiler())
    step, state, _ = checkpoint.latest(folder / "checkpoints", state, {})
    return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def assert_same_lines(found, expected, tolerance=1e-5):
    """The same events, and the same numbers in them up to rounding."""
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        assert line["split"] == other["split"]
        numbers = {name: value for name, value in other.items() if name != "split"}
        assert {name: line[name] for name in numbers} == pytest.approx(
            numbers, abs=tolerance, rel=tolerance
        )

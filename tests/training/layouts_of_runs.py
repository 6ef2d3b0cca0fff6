"""Whole runs under every layout. Run by `test_parallel.py` on eight CPU devices."""

import signal

import jax
import pytest
from small_run import assert_same_lines, final_parameters, lines, small

from normlab.config import load_config
from normlab.errors import UserError
from normlab.training.loop import train
from normlab.training.signals import Interrupted

RUN = {
    "train__num_steps": 20,
    "train__batch_size": 32,
    "eval__every_steps": 10,
    "log__every_steps": 5,
    "log__tensorboard": False,
    "checkpoint__every_steps": 10,
    "data__flip": True,
    "data__crop_padding": 1,
    "train__ema_decay": 0.9,
}
LAYOUTS = {
    "jit over 8": {},
    "pmap over 8": {"parallel__mode": "pmap"},
    "jit over 5, padded": {"parallel__num_devices": 5, "parallel__pad_batch": True},
    "pmap over 5, padded": {
        "parallel__mode": "pmap",
        "parallel__num_devices": 5,
        "parallel__pad_batch": True,
    },
}
MICRO = {
    "2 microbatches, jit over 8": {"train__microbatches": 2},
    "4 microbatches, pmap over 4": {
        "train__microbatches": 4,
        "parallel__mode": "pmap",
        "parallel__num_devices": 4,
    },
    "2 microbatches, pmap over 5, padded": {
        "train__microbatches": 2,
        "parallel__mode": "pmap",
        "parallel__num_devices": 5,
        "parallel__pad_batch": True,
    },
}
GHOST = {"batch_stats__scope": "ghost", "batch_stats__ghost_size": 4}
ONE = {"parallel__num_devices": 1}


def metrics(norm, folder, **fields):
    train(small(norm, **(RUN | fields)), folder)
    return lines(folder)


@pytest.mark.parametrize(
    ("norm", "fields", "layouts"),
    [
        ("batch_norm", {}, LAYOUTS),
        ("batch_renorm", GHOST, LAYOUTS | MICRO),
        ("layer_norm", {}, MICRO),
    ],
)
def test_the_metrics_of_a_run_of_twenty_steps_are_the_same(norm, fields, layouts, tmp_path):
    expected = metrics(norm, tmp_path / "one", **ONE, **fields)
    assert any(line["split"] == "train" for line in expected)
    for name, layout in layouts.items():
        found = metrics(norm, tmp_path / name, **fields, **layout)
        assert_same_lines(found, expected)


def test_scope_device_is_ghosts_of_a_devices_share(tmp_path):
    """32 examples on 8 devices: groups of 4."""
    ghosts = metrics("batch_norm", tmp_path / "ghost", **ONE, **GHOST)
    for mode in ("jit", "pmap"):
        fields = {"batch_stats__scope": "device", "parallel__mode": mode}
        assert_same_lines(metrics("batch_norm", tmp_path / mode, **fields), ghosts)


def test_what_is_dropped_is_the_same_on_any_layout(tmp_path):
    fields = {"model__dropout": 0.5, "model__stochastic_depth": 0.3, "model__stage_sizes": (1, 1)}

    def run(name, **layout):
        made = RUN | fields | layout
        made = {key.replace("__", "."): value for key, value in made.items()}
        config = load_config("configs/digits.py:model=preact_resnet20", made | {"model.width": 4})
        train(config, tmp_path / name)
        return lines(tmp_path / name)

    expected = run("one", **ONE, train__num_steps=5)
    dry = run("dry", **ONE, train__num_steps=5, model__dropout=0.0, model__stochastic_depth=0.0)
    assert expected[-1]["loss"] != pytest.approx(dry[-1]["loss"], abs=1e-4)
    assert_same_lines(run("pmap", parallel__mode="pmap", train__num_steps=5), expected)
    assert_same_lines(run("jit", train__num_steps=5), expected)


def test_a_checkpoint_goes_on_under_another_layout(tmp_path):
    """Ten steps on one device, the rest as a replica a device; a kill between."""
    whole = metrics("batch_norm", tmp_path / "whole", **ONE)

    told = []

    def stop(step, _num_steps, _line):
        if step >= 10 and not told:  # a second signal would end the process
            told.append(step)
            signal.raise_signal(signal.SIGTERM)

    folder = tmp_path / "moved"
    with pytest.raises(Interrupted):
        train(small("batch_norm", **(RUN | ONE)), folder, progress=stop)
    layout = {"parallel__mode": "pmap", "parallel__num_devices": 4}
    train(small("batch_norm", **(RUN | layout)), folder)
    assert_same_lines(lines(folder), whole)
    step, _ = final_parameters(folder, small("batch_norm", **RUN))
    assert step == 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train__batch_size": 36},
            r"36 does not split over 8 devices \(36 / 8 = 4.5\); nearest: 32 or 40, "
            "or parallel.pad_batch=true",
        ),
        (
            {"train__batch_size": 48, "train__microbatches": 4, **GHOST},
            r"does not split over 4 microbatches on 8 devices \(48 / 32 = 1.5\); "
            "nearest: 32 or 64",
        ),
        (
            {
                "train__batch_size": 36,
                "parallel__pad_batch": True,
                "batch_stats__scope": "device",
            },
            "36 examples are no equal shares of 8 devices",
        ),
        ({"parallel__num_devices": 9}, "'parallel.num_devices' = 9 must be from 1 to 8"),
        (
            {
                "parallel__mode": "pmap",
                "train__batch_size": 96,
                "batch_stats__scope": "ghost",
                "batch_stats__ghost_size": 8,
            },
            "groups of 8 examples do not fit 8 devices of 12; use jit",
        ),
        ({"parallel__mode": "pmap", "parallel__steps_per_dispatch": 2}, "takes 1 at a time"),
    ],
)
def test_what_the_devices_cannot_do_is_refused(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(small(**(RUN | fields)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_there_are_eight_devices():
    assert jax.device_count() == 8

"""What one seed of a config has compiled, the next seeds of it take as it is."""

import dataclasses

import pytest
from small_run import SMALL

from normlab.config import load_config
from normlab.data import describe
from normlab.run_length import RunLength
from normlab.training.loop import train
from normlab.training.programs import Programs

DRAWS = {
    **{"data.mixup_share": 0.5, "data.crop_padding": 1, "data.num_validation": 300},
    **{"model.dropout": 0.3, "model.stochastic_depth": 0.3},
    **{"model.stage_sizes": (1, 1), "model.width": 4},
    **{"train.num_steps": 4, "log.every_steps": 2},
}
"""Whatever can be drawn by the seed: the order, the crops and mixtures, the dropped units."""


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("configs/digits.py:norm=batch_renorm", SMALL),
        ("configs/digits.py:norm=none,conv=weight_norm", SMALL),  # its gains start from data
        ("configs/digits.py:norm=batch_norm,model=preact_resnet20", DRAWS),
    ],
)
def test_a_seed_after_another_gives_the_bytes_that_it_gives_alone(source, fields, tmp_path):
    programs = Programs()
    seeds = [load_config(source, {**fields, "seed": seed}) for seed in (3, 4)]
    first = train(seeds[0], tmp_path / "first", programs=programs)
    after = train(seeds[1], tmp_path / "after", programs=programs)
    alone = train(seeds[1], tmp_path / "alone")
    metrics = {path.name: (path / "metrics.jsonl").read_bytes() for path in tmp_path.iterdir()}
    assert metrics["after"] == metrics["alone"]
    assert metrics["after"] != metrics["first"]
    assert first["compile_seconds"] > 0
    assert after["compile_seconds"] == 0
    assert after["step_memory_bytes"] == alone["step_memory_bytes"]


def of(programs, **fields):
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    config = load_config("configs/digits.py", fields)
    return programs.of(config, describe(config.data), RunLength.of(config))


@pytest.mark.parametrize(
    "field", [{"optim__base_lr": 0.3}, {"probe__signals": True}, {"parallel__pad_batch": True}]
)
def test_programs_are_those_of_a_config_in_all_but_its_seed(field):
    programs = Programs()
    kept = of(programs, seed=1)
    assert of(programs, seed=2) is kept
    assert of(programs, seed=2, **field) is not kept


def test_a_data_set_that_has_grown_has_programs_of_its_own():
    """Its schedule is longer, though its batches look the same."""
    config, programs = load_config("configs/digits.py"), Programs()
    info, length = describe(config.data), RunLength.of(config)
    kept = programs.of(config, info, length)
    assert programs.of(config, info, length) is kept
    more = dataclasses.replace(length, num_steps=2 * length.num_steps)
    assert programs.of(config, info, more) is not kept
    assert programs.of(config, dataclasses.replace(info, mean=(0.25,)), length) is not kept


def test_of_more_configs_than_are_kept_those_used_last_stay():
    programs = Programs(most=2)
    a, b = of(programs, optim__base_lr=0.1), of(programs, optim__base_lr=0.2)
    assert of(programs, optim__base_lr=0.1) is a
    of(programs, optim__base_lr=0.3)
    assert of(programs, optim__base_lr=0.1) is a
    assert of(programs, optim__base_lr=0.2) is not b

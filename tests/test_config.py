"""Configs: choices, overrides and their errors, durations, saving, identity."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from normlab.config import (
    apply_overrides,
    field_type,
    flatten,
    from_json,
    identity,
    layered,
    load_config,
    run_id,
    to_json,
)
from normlab.errors import UserError
from normlab.meanings import field_meanings, meanings
from normlab.models import MODELS
from normlab.norms import NORMS
from normlab.optim import OPTIMIZERS
from normlab.run_length import RunLength
from normlab.training.setup import build_parts

CONFIGS = sorted(
    path.stem for path in Path("configs").glob("*.py") if path.stem not in ("__init__", "base")
)


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Loading and choices


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_locked_and_says_where_it_came_from(name):
    config = load_config(f"configs/{name}.py")
    assert config.is_locked
    assert config.source == f"configs/{name}.py"
    assert RunLength.of(config).num_steps > 0


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_brings_its_own_fields_and_not_the_factorys(norm):
    fields = load_config(f"configs/digits.py:norm={norm}").norm
    assert fields.kind == norm
    for name in ("parent", "name", "scale_init", "stats_scope", "ghost_size", "axis_name"):
        assert name not in fields


def test_a_default_is_the_classs_own():
    assert load_config("configs/digits.py:norm=batch_norm").norm.momentum == 0.9
    assert load_config("configs/cifar10.py:norm=group_norm").norm.num_groups == 32


def test_choices_decide_model_and_optimizer():
    config = load_config("configs/digits.py:model=mlp,optimizer=adamw,norm=none")
    assert (config.model.kind, config.optim.kind, config.norm.kind) == ("mlp", "adamw", "none")
    assert config.optim.b2 == 0.999
    assert "momentum" not in config.optim


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "configs/digits.py:norm=bach_norm",
            "unknown norm 'bach_norm'; did you mean 'batch_norm'?",
        ),
        ("configs/digits.py:model=lenet", "unknown model 'lenet'; did you mean 'lenet5'?"),
        ("configs/digits.py:optimizer=sdg", "unknown optimizer 'sdg'; did you mean 'sgd'?"),
        ("configs/digits.py:nrom=none", "unknown choice 'nrom'; did you mean 'norm'?"),
        ("configs/digits.py:none", "choice 'none' after the colon is not key=value"),
        ("configs/digit.py", "did you mean 'configs/digits.py'?"),
        ("configs/digits", "is not a .py file"),
    ],
)
def test_a_wrong_choice_is_one_line_with_the_nearest_right_one(source, expected):
    assert expected in error_of(load_config, source)


def test_a_config_file_of_ones_own_may_start_from_base(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from configs import base\n"
        "def get_config(argument=''):\n"
        "    config = base.get_config(argument, norm='layer_norm')\n"
        "    config.train.batch_size = 32\n"
        "    return config\n"
    )
    config = load_config(f"{tmp_path}/mine.py")
    assert (config.norm.kind, config.train.batch_size) == ("layer_norm", 32)
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    assert "does not load" in error_of(load_config, f"{tmp_path}/broken.py")
    (tmp_path / "empty.py").write_text("")
    assert "does not load" in error_of(load_config, f"{tmp_path}/empty.py")


# Overrides


def overridden(**fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config("configs/digits.py", names)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.batch_size", "32", 32),
        ("train.batch_size", "1e2", 100),
        ("optim.base_lr", "1", 1.0),
        ("data.flip", "true", True),
        ("data.flip", "False", False),
        ("model.widths", "(8,8,8)", (8, 8, 8)),
        ("model.widths", "8,8", (8, 8)),
        ("optim.clip_norm", "none", None),
        ("data.path", "/data/none.tar", "/data/none.tar"),
        ("optim.schedule", "linear", "linear"),
    ],
)
def test_text_becomes_the_fields_type(name, text, value):
    config = load_config("configs/digits.py", {name: text})
    found = flatten(config)[name]
    assert found == value
    assert type(found) is type(value)


def test_a_field_that_may_be_empty_can_be_emptied_whatever_its_default():
    source = "configs/cifar10.py:model=nf_resnet20"
    assert load_config(source).model.skip_gain == 0.0
    config = load_config(source, {"model.skip_gain": "none"})
    assert config.model.skip_gain is None
    assert field_type(config.model, "skip_gain") == (float, True)
    assert from_json(to_json(config)).model.skip_gain is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train.batchsize", "32", "unknown config field 'train.batchsize'; did you mean"),
        ("norm.num_groups", "8", "unknown config field 'norm.num_groups'"),
        ("train.batch_size", "many", "'train.batch_size' takes an int, not 'many'"),
        ("train.batch_size", "1.5", "takes an int, not '1.5'"),
        ("train.batch_size", "true", "takes an int"),
        ("train.batch_size", "none", "takes an int, not 'none'"),
        ("train.batch_size", None, "cannot be none"),
        ("optim.base_lr", "nan", "takes a float"),
        ("optim.base_lr", "1e999", "takes a float"),
        ("data.flip", "1", "takes true or false"),
        ("data.flip", "yes", "takes true or false"),
        ("norm.kind", "layer_norm", "read-only; choose with ':norm=layer_norm'"),
        ("optim.kind", "adam", "read-only; choose with ':optimizer=adam'"),
        ("source", "x", "read-only"),
        ("train", "3", "unknown config field 'train'"),
    ],
)
def test_a_wrong_override_is_one_line(name, value, expected):
    assert expected in error_of(load_config, "configs/digits.py", {name: value})


def test_a_mistake_leaves_no_half_set_config():
    config = load_config("configs/digits.py")
    error_of(apply_overrides, config, {"train.batch_size": "x"})
    assert config.train.batch_size == 64


# Durations


def test_the_unit_given_last_replaces_the_default_one():
    config = overridden(train__num_steps="7")
    assert (config.train.num_steps, config.train.num_epochs) == (7, None)
    assert RunLength.of(config).num_steps == 7


def test_two_units_of_one_duration_are_refused():
    config = overridden(train__num_steps=7, train__num_epochs=2.0)
    assert "exactly one" in error_of(RunLength.of, config)


def test_the_layer_above_replaces_a_duration_in_another_unit():
    below, above = {"train.num_epochs": 3, "optim.base_lr": 0.1}, {"train.num_steps": 7}
    assert layered(below, above) == {"optim.base_lr": 0.1, "train.num_steps": 7}
    # Within a layer both stay, to be refused.
    both = {"train.num_steps": 7, "train.num_epochs": 2}
    assert layered({}, both) == both
    assert layered({"optim.base_lr": 0.1}, {"optim.base_lr": 0.2}) == {"optim.base_lr": 0.2}


def test_durations_become_steps():
    # 1,437 training images / batch 64 = 22 full batches; 15 epochs = 330 steps.
    length = RunLength.of(load_config("configs/digits.py"))
    assert (length.steps_per_epoch, length.num_steps) == (22, 330)
    section = ConfigDict({"a_epochs": 0.5, "b_examples": 6400, "c_fraction": 0.1, "d_steps": 5})
    assert [length.steps(section, stem) for stem in "abcd"] == [11, 100, 33, 5]
    assert length.steps(section, "e") is None
    assert length.steps(ConfigDict({"m_fraction": (0.5, 0.75)}), "m") == (165, 248)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train.batch_size", 2000, "from 1 to 1437"),
        ("train.batch_size", 0, "from 1 to 1437"),
        ("train.num_steps", 0, "no step"),
        ("train.num_epochs", -1.0, "0 or more"),
    ],
)
def test_a_run_of_impossible_length_is_refused(name, value, expected):
    config = load_config("configs/digits.py", {name: value})
    assert expected in error_of(RunLength.of, config)


def test_renorms_ramps_are_durations_that_fit_a_short_run():
    config = load_config("configs/digits.py:norm=batch_renorm")
    length = RunLength.of(config)
    # The paper's 5k, 25k and 40k of 160k steps; of 330: 10.3, 51.6, 82.5.
    assert [length.steps(config.norm, s) for s in ("ramp_start", "d_ramp_end", "r_ramp_end")] == [
        10,
        52,
        82,
    ]


def test_power_norms_warmup_is_a_part_of_the_run_and_can_be_said_in_any_unit():
    config = load_config("configs/digits.py:norm=power_norm")
    # 10k of 300k steps; of 330 steps 11.
    assert RunLength.of(config).steps(config.norm, "warmup") == 11
    asked = {"norm.warmup_fraction": None, "norm.warmup_steps": 7}
    config = load_config("configs/digits.py:norm=power_norm", asked)
    assert RunLength.of(config).steps(config.norm, "warmup") == 7


# Saving and identity


@pytest.mark.parametrize("norm", ["batch_norm", "batch_renorm", "group_norm", "none"])
def test_a_saved_config_reloads_with_its_types(norm):
    config = load_config(
        f"configs/cifar10.py:norm={norm}", {"train.num_steps": 5, "optim.clip_norm": 2.0}
    )
    again = from_json(to_json(config))
    assert again.to_dict() == config.to_dict()
    for name in flatten(config):
        section, _, key = name.rpartition(".")
        old, new = (c[section] if section else c for c in (config, again))
        assert field_type(old, key) == field_type(new, key), name


def test_a_config_of_another_schema_or_file_is_refused():
    data = to_json(load_config("configs/digits.py"))
    assert "schema version 0" in error_of(from_json, {**data, "schema_version": 0})
    assert "does not exist" in error_of(from_json, {**data, "source": "configs/gone.py"})
    extra = {**data, "train": {**data["train"], "fresh": 1}}
    assert "unknown config field 'train.fresh'" in error_of(from_json, extra)


def test_a_saved_config_lacks_a_later_field_only_where_it_can_change_no_result():
    config = load_config("configs/digits.py", {"log.tensorboard": False})
    data = to_json(config)
    del data["log"]["tensorboard"]
    assert from_json(data).log.tensorboard is True
    del data["train"]["ema_decay"]
    assert "lacks the field 'train.ema_decay'" in error_of(from_json, data)


def ids(*changes, norm="batch_norm", stateful=True, devices=1):
    source = f"configs/digits.py:norm={norm}"
    return [
        run_id(identity(load_config(source, change), stateful=stateful, num_devices=devices))
        for change in changes
    ]


def test_a_runs_id_is_twelve_hex_digits_of_what_matters():
    base, seed, logs, path = ids({}, {"seed": 1}, {"log.every_steps": 3}, {"checkpoint.keep": 1})
    assert len(base) == 12
    assert int(base, 16) >= 0
    assert base != seed
    assert base == logs == path


def test_scopes_that_cannot_differ_share_an_id():
    ghost = {"batch_stats.scope": "ghost", "batch_stats.ghost_size": 1}
    unused = {"batch_stats.ghost_size": 1}
    plain, ghosted, unused_size = ids({}, ghost, unused)
    assert plain != ghosted
    assert plain == unused_size
    layer, layer_ghosted = ids({}, ghost, norm="layer_norm", stateful=False)
    assert layer == layer_ghosted


def test_the_number_of_devices_matters_to_scope_device_alone():
    device = {"batch_stats.scope": "device"}
    assert ids(device, devices=1) != ids(device, devices=8)
    assert ids({}, devices=1) == ids({}, devices=8)


def test_meanings_come_from_comments():
    source = (
        'config.a.b = 1  # how many\n    add_duration(config, "c.every", steps=2)  # how often\n'
        "class X:\n    momentum: float = 0.9  # of the average\n    other: int = 1\n"
    )
    assert meanings(source) == {
        "a.b": "how many",
        "c.every": "how often",
        "momentum": "of the average",
    }


@pytest.mark.parametrize(
    "choice",
    [f"norm={name}" for name in NORMS]
    + [f"model={name}" for name in MODELS]
    + [f"optimizer={name}" for name in OPTIMIZERS],
)
def test_every_field_has_a_meaning(choice):
    config = load_config(f"configs/cifar10.py:{choice}")
    meaning = field_meanings(config)
    assert [name for name in flatten(config) if not meaning.get(name)] == []


@pytest.mark.parametrize(
    ("norm", "field", "value", "expected"),
    [
        ("proxy_norm", "norm.proxy_epsilon", -1.0, "'norm.proxy_epsilon' = -1.0 must be 0.0 or"),
        ("online_norm", "norm.backward_momentum", 2.0, "must be from 0.0 to 1.0"),
        ("online_norm", "norm.limit", -1.0, "'norm.limit' = -1.0"),
        ("online_norm", "norm.control", "clmp", "section 'norm'.*control 'clmp' is none of clamp"),
        ("batch_norm", "norm.inference_weight", 5.0, "must be from 0.0 to 1.0"),
        ("batch_norm", "norm.dtype", "int8", "'norm.dtype' 'int8'"),
        ("batch_norm", "norm.param_dtype", "flot32", "'norm.param_dtype' 'flot32'.*'float32'"),
        ("moving_average_batch_norm", "norm.correction_max", 0.5, "must be 1.0 or more"),
        ("moving_average_batch_norm", "norm.window", 0, "'norm.window' = 0 must be from 1"),
        ("iterative_norm", "norm.num_iterations", -1, "'norm.num_iterations' = -1"),
    ],
)
def test_a_field_of_no_normalizer_is_refused_by_its_name(norm, field, value, expected):
    config = load_config(f"configs/digits.py:norm={norm}", {field: value})
    with pytest.raises(UserError, match=expected):
        build_parts(config, need_data=False)

"""`config.norm_overrides`: a layer, a stage or the stem with another normalizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict

from normlab.config import from_json, load_config, to_json
from normlab.errors import UserError
from normlab.models import build
from normlab.models.layers import norm_layers
from normlab.norms import FilterResponseNorm, Identity, NormFactory
from normlab.run_length import RunLength
from normlab.training.evaluate import Evaluator
from normlab.training.examples import load_data
from normlab.training.parallel import Compiler, make_mesh
from normlab.training.setup import build_parts, id_of, run_identity
from normlab.training.state import create_state


def config_of(overrides, model="resnet20", norm="batch_norm", data="cifar10"):
    source = f"configs/{data}.py:model={model},norm={norm}"
    return load_config(source, {"norm_overrides": overrides})


def kinds_of(config, shape=(32, 32, 3)):
    return {layer.path: layer.kind for layer in norm_layers(build(config), shape)}


def test_a_pattern_names_a_stem_a_layer_or_a_stage():
    kinds = kinds_of(config_of("norm_stem=none,stage2_*=layer_norm,stage3_block1/norm2=rms_norm"))
    other = {path: kind for path, kind in kinds.items() if kind != "batch_norm"}
    stage2 = [f"stage2_block{block}/norm{i}" for block in (1, 2, 3) for i in (1, 2)]
    assert other == {
        "norm_stem": "none",
        **dict.fromkeys(stage2, "layer_norm"),
        "stage3_block1/norm2": "rms_norm",
    }
    assert len(kinds) == 19
    assert set(kinds_of(config_of("")).values()) == {"batch_norm"}


def test_where_several_patterns_fit_the_last_one_holds():
    kinds = kinds_of(config_of("*=none,*/norm1=layer_norm"))
    assert kinds["stage1_block1/norm1"] == "layer_norm"
    assert kinds["norm_stem"] == "none"
    assert "layer_norm" not in kinds_of(config_of("*/norm1=layer_norm,*=none")).values()


def test_convolutions_have_a_bias_if_any_normalizer_has_none():
    def has_bias(overrides, **choices):
        config = config_of(overrides, "cnn", data="digits", **choices)
        net = build(config)
        variables = jax.eval_shape(
            lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
        )
        return "bias" in variables["params"]["conv3"]

    assert not has_bias("norm1=layer_norm")
    assert has_bias("norm1=none")
    assert has_bias("norm1=layer_norm", norm="none")


class Two(nn.Module):
    """Two normalizers, each with an activation that makes 7 of everything."""

    norm: NormFactory

    @nn.compact
    def __call__(self, x):
        acts = [self.norm.norm_act(name=f"norm{i}", activation=sevens) for i in (1, 2)]
        return [act(x, train=False) for act in acts]


def sevens(x):
    return jnp.full_like(x, 7)


@pytest.mark.parametrize(
    ("cls", "other"), [(Identity, FilterResponseNorm), (FilterResponseNorm, Identity)]
)
def test_a_layer_may_differ_in_whether_it_takes_the_activations_place(cls, other):
    one = NormFactory(other, FrozenDict())
    net = Two(NormFactory(cls, FrozenDict(), overrides=(("norm2", one),)))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    for kind, y in zip((cls, other), net.init_with_output(jax.random.key(0), x)[0], strict=True):
        assert bool((y == 7).all()) == (kind is Identity)


def test_fields_are_the_defaults_of_the_overriding_class_and_the_scope_is_the_runs():
    config = config_of("norm_stem=batch_norm", norm="batch_renorm")
    config.norm.momentum, config.batch_stats.scope = 0.5, "device"
    factory = build(config).norm
    assert factory.module.momentum == 0.5
    stem = factory.at("norm_stem")
    assert stem.module.momentum == 0.9
    assert stem.module.stats_scope == "device"
    assert factory.at("stage1_block1/norm1") is factory


def test_durations_of_an_overriding_class_are_parts_of_the_run():
    """Or renormalization in one layer would stay plain through a run of less than 5,000 steps."""
    config = config_of("norm_stem=batch_renorm", norm="none")
    steps = RunLength.of(config).num_steps
    found = build(config).norm.at("norm_stem").module
    assert found.ramp_start_steps == round(5 / 160 * steps)
    assert found.r_ramp_end_steps == round(40 / 160 * steps)


@pytest.mark.parametrize("kind", ["dyt", "derf"])
def test_an_offset_behind_a_bend_leaves_the_layer_before_it_its_own(kind):
    """tanh(αx) + β is no tanh(α(x + b)): the place of the bend is b's alone."""
    params = {
        norm: jax.eval_shape(
            lambda norm=norm: build(config_of("", norm=norm)).init(
                jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False
            )["params"]
        )
        for norm in (kind, "batch_norm")
    }
    assert set(params[kind]["conv_stem"]) == {"kernel", "bias"}
    assert set(params["batch_norm"]["conv_stem"]) == {"kernel"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("norm_stm=none", r"unknown normalizer in 'norm_overrides' 'norm_stm'.*'norm_stem'"),
        ("norm_stem=layer_nrom", r"unknown norm in 'norm_overrides' 'layer_nrom'.*'layer_norm'"),
        ("norm_stem", r"has 'norm_stem', which is not pattern=kind"),
        ("=none", r"has '=none', which is not pattern=kind"),
    ],
)
def test_what_fits_nothing_is_refused_with_the_nearest_name(overrides, message):
    with pytest.raises(UserError, match=message):
        build_parts(config_of(overrides), need_data=False)


def test_texts_survive_the_config_file_and_every_way_of_typing_them():
    config = config_of("norm_stem=none, stage1_*=layer_norm")
    assert config.norm_overrides == ("norm_stem=none", "stage1_*=layer_norm")
    assert config_of("('norm_stem=none', 'stage1_*=layer_norm')") == config
    assert from_json(to_json(config)).norm_overrides == config.norm_overrides
    assert from_json(to_json(config_of(""))).norm_overrides == ()
    with pytest.raises(UserError, match=r"'norm_overrides' takes a tuple of str"):
        config_of("(1, 2)")


def test_overrides_are_part_of_what_a_run_is():
    assert id_of(config_of("norm_stem=none")) != id_of(config_of(""))
    # A stateless net with one batch norm has a scope of statistics.
    stateless = config_of("", norm="layer_norm")
    one = config_of("norm_stem=batch_norm", norm="layer_norm")
    for config in (stateless, one):
        config.batch_stats.scope = "device"
    assert run_identity(stateless)["batch_stats"]["scope"] == "global"
    assert run_identity(one)["batch_stats"]["scope"] == "device"
    assert build(one).norm.stateful
    assert not build(stateless).norm.stateful


def test_recomputed_statistics_are_each_normalizers_own():
    """batch_norm keeps a variance, batch_renorm a σ with ε in it: both from one pass."""
    config = config_of("norm2=batch_renorm,norm3=none", "cnn", data="digits")
    config.model.widths, config.model.strides = (4, 4, 4), (2, 1, 2)
    parts = build_parts(config)
    compiler, mesh = Compiler(), make_mesh()
    variables = create_state(parts, compiler).variables()
    examples = load_data(config, mesh).train
    made = Evaluator(parts.model, parts.info, mesh, compiler)
    found = made.recompute(variables, examples, 128)["batch_stats"]
    assert set(found) == {"norm1", "norm2"}
    assert set(found["norm1"]) == {"mean", "var"}
    assert set(found["norm2"]) == {"mean", "sigma", "step"}
    assert not np.allclose(found["norm2"]["sigma"], 1.0)


def test_overrides_may_leave_no_normalizer_with_state():
    config = config_of("*=layer_norm", "mlp", data="digits")
    config.model.widths = (4,)
    parts = build_parts(config)
    compiler, mesh = Compiler(), make_mesh()
    variables = create_state(parts, compiler).variables()
    made = Evaluator(parts.model, parts.info, mesh, compiler)
    assert made.recompute(variables, load_data(config, mesh).train, 1437) == variables


def test_the_name_that_asks_for_a_place_leaves_no_variable():
    net = build(config_of("norm2=layer_norm", "cnn", data="digits"))
    variables = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    )
    names = {f"{kind}{i}" for kind in ("conv", "norm") for i in range(1, 6)} | {"head"}
    assert set(variables["params"]) == names
    assert set(variables["batch_stats"]) == {f"norm{i}" for i in (1, 3, 4, 5)}

"""Theory beside a measurement: only where its conditions hold."""

import dataclasses
import math

import pytest

from normlab.analysis.mean_field import gradient_growth
from normlab.analysis.predictions import predicted_growth, predicted_signals
from normlab.analysis.signals import measure_signals
from normlab.analysis.subject import fresh
from normlab.config import load_config
from normlab.models.activations import relu
from normlab.training.probe import block_paths


def subject_of(choices, inputs="gaussian", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    config = load_config(f"configs/digits.py:{choices}", names)
    return fresh(config, num_seeds=1, inputs=inputs)


def test_the_growth_of_gradients_is_predicted_for_batch_norm_in_plain_networks():
    fields = {"model__activation": "relu"}
    limit = (gradient_growth(relu), "limit of large batches")
    assert predicted_growth(subject_of("model=mlp", **fields)) == limit
    assert limit[0] == pytest.approx(math.pi / (math.pi - 1))
    ghosts = {"batch_stats__scope": "ghost", "batch_stats__ghost_size": 8}
    linear = subject_of("model=mlp", model__activation="identity", **ghosts)
    assert predicted_growth(linear) == (6 / 5, "exact for a batch of 8")
    for choices in ("model=cnn", "model=mlp,norm=layer_norm", "model=mlp,conv=weight_norm"):
        assert predicted_growth(subject_of(choices)) is None
    for fields in (
        {"norm_overrides": ("norm1=none",)},
        {"norm__epsilon": 0.01},
        {"inputs": "data"},
    ):
        assert predicted_growth(subject_of("model=mlp", **fields)) is None
    trained = dataclasses.replace(linear, variables={"params": {}})
    assert predicted_growth(trained) is None
    ghosts["batch_stats__ghost_size"] = 2
    assert predicted_growth(subject_of("model=mlp", model__activation="identity", **ghosts)) is None


def signals_of(choices, **fields):
    subject = subject_of(choices, model__stage_sizes=(2, 2), model__width=4, **fields)
    blocks = block_paths(subject.parts.model, subject.parts.info.image_shape)
    return predicted_signals(subject, blocks)


def test_signals_of_pre_activation_networks_by_hand():
    # Behind the stem 2; 1 a block; the transition has its shortcut's 1 and its branch's 1.
    moments = [sum(block.stream) for block in signals_of("model=preact_resnet20")]
    assert moments == pytest.approx([3, 4, 2, 3])
    plain = [sum(block.stream) for block in signals_of("model=preact_resnet20,norm=none")]
    assert plain == pytest.approx([4, 8, 16, 32], rel=1e-4)
    free = signals_of("model=nf_resnet20", model__skip_gain=1.0, model__alpha=0.5)
    assert [block.stream.variance for block in free] == [1.25, 1.5, 1.25, 1.5]


def test_the_activation_is_free_where_the_deviation_is_divided_out_before_it():
    fields = {"model__beta": "before", "model__activation": "silu"}
    free = signals_of("model=nf_resnet20", **NF, **fields)
    assert [block.branch.variance for block in free] == [1.0] * 4


NF = {"model__skip_gain": 1.0}


@pytest.mark.parametrize(
    ("choices", "fields"),
    [
        ("model=nf_resnet20", {}),  # its skip gain is 0: β expects what is not there
        ("model=nf_resnet20", {"model__skip_gain": 1.0, "model__gain": "none"}),
        ("model=nf_resnet20", NF | {"model__activation": "silu"}),  # 1/β behind it
        ("model=nf_resnet20", NF | {"model__downsample": "pool"}),
        ("model=nf_resnet20", NF | {"model__squeeze_excite": 0.5}),
        ("model=preact_resnet20", {"model__downsample": "pool"}),
        ("model=preact_resnet20", {"model__squeeze_excite": 0.5}),
        ("model=preact_resnet20", {"norm__epsilon": 0.01}),
        ("model=preact_resnet20", {"inputs": "data"}),
        ("model=preact_resnet20", {"norm_overrides": ("norm_last=none",)}),
        ("model=preact_resnet20,norm=group_norm", {}),
        ("model=resnet20", {}),
    ],
)
def test_no_signals_are_predicted_where_the_theory_says_nothing(choices, fields):
    assert signals_of(choices, **fields) is None


def test_what_is_not_predicted_has_no_column():
    assert not measure_signals(subject_of("model=mlp", model__widths=(4,))).predicted

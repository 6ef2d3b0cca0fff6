"""Models: parameter counts with their sources, shapes, pairing, and what is injected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from normlab.config import load_config
from normlab.errors import UserError
from normlab.models import build, count_params
from normlab.models.layers import norm_layers
from normlab.norms import NORMS


def config_of(model, norm="batch_norm", data="cifar10", **overrides):
    return load_config(
        f"configs/{data}.py:model={model},norm={norm}",
        {name.replace("__", "."): value for name, value in overrides.items()},
    )


def shapes_of(config, image_shape):
    model = build(config)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, images)


# Sum by hand for ResNet-20, option A: stem 3·3·3·16 = 432 and norm 32; stage 1: 6 convolutions
# 9·16·16 = 2,304 with norms of 32; stage 2: 9·16·32 + 5·9·32·32 = 50,688 with 6 norms of 64;
# stage 3: 9·32·64 + 5·9·64·64 = 202,752 with 6 norms of 128; head 650. Total 269,722.
# A further block a stage (n + 1) adds 2·(2,304 + 32) + 2·(9,216 + 64) + 2·(36,864 + 128) = 97,216.
RESNET20 = 432 + 32 + 6 * (2304 + 32) + 50_688 + 6 * 64 + 202_752 + 6 * 128 + 650
BLOCK = 2 * (2304 + 32) + 2 * (9216 + 64) + 2 * (36_864 + 128)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("resnet20", RESNET20),  # He et al. 2016, table 6: 0.27M
        ("resnet32", RESNET20 + 2 * BLOCK),  # 0.46M
        ("resnet44", RESNET20 + 4 * BLOCK),  # 0.66M
        ("resnet56", RESNET20 + 6 * BLOCK),  # 0.85M
        ("resnet110", RESNET20 + 15 * BLOCK),  # 1.7M
        ("resnet18_cifar", 11_173_962),  # K. Liu, pytorch-cifar
    ],
)
def test_parameter_counts_on_cifar(model, count):
    assert count_params(shapes_of(config_of(model), (32, 32, 3))["params"]) == count


def test_resnet20_has_the_published_count_in_digits():
    assert RESNET20 == 269_722
    assert RESNET20 + 15 * BLOCK == 1_727_962


@pytest.mark.parametrize(
    ("model", "count"),
    [  # torchvision's models with 1,000 classes; CIFAR-100's head has 900 outputs fewer
        ("resnet18", 11_689_512 - 900 * 513),
        ("resnet34", 21_797_672 - 900 * 513),
        ("resnet50", 25_557_032 - 900 * 2049),
        ("resnet101", 44_549_160 - 900 * 2049),
        ("resnet152", 60_192_808 - 900 * 2049),
    ],
)
def test_parameter_counts_of_imagenet_resnets(model, count):
    shapes = shapes_of(config_of(model, data="cifar100"), (224, 224, 3))
    assert count_params(shapes["params"]) == count


def test_lenet5_with_batch_norm_has_44878_parameters():
    # conv 6·25 + 6, norm 12, conv 16·6·25 + 16, norm 32, dense 256·120 + 120, norm 240,
    # dense 120·84 + 84, norm 168, head 850.
    by_hand = 156 + 12 + 2416 + 32 + 30_840 + 240 + 10_164 + 168 + 850
    assert by_hand == 44_878
    assert (
        count_params(shapes_of(config_of("lenet5", data="mnist"), (28, 28, 1))["params"]) == by_hand
    )


def test_lenet5_takes_images_from_16_pixels_on_and_says_so_of_smaller_ones():
    config = config_of("lenet5")
    # One position is left: 16 - 4 = 12, 6, 2, 1.
    kernel = shapes_of(config, (16, 16, 3))["params"]["dense1"]["kernel"]
    assert kernel.shape == (16, 120)
    with pytest.raises(ValueError, match=r"^15×16 pixels; the smallest side is 16"):
        shapes_of(config, (15, 16, 3))


def test_mlp_of_three_hundred_sigmoids():
    # 784·100 + 3 norms of 200 + 2·100·100 + head 1,010; no biases beside batch norm's.
    shapes = shapes_of(config_of("mlp", data="mnist"), (28, 28, 1))
    assert count_params(shapes["params"]) == 78_400 + 20_000 + 600 + 1_010
    assert config_of("mlp", data="mnist").model.activation == "sigmoid"


def test_projection_shortcuts_add_parameters_and_padding_shortcuts_none():
    a = count_params(shapes_of(config_of("resnet20"), (32, 32, 3))["params"])
    b = count_params(shapes_of(config_of("resnet20", model__shortcut="B"), (32, 32, 3))["params"])
    assert b - a == 16 * 32 + 64 + 32 * 64 + 128  # two 1×1 convolutions and their norms
    with pytest.raises(UserError, match=r"model\.shortcut.*'C'"):
        shapes_of(config_of("resnet20", model__shortcut="C"), (32, 32, 3))


def test_a_convolution_has_a_bias_only_where_the_normalizer_has_none():
    with_norm = shapes_of(config_of("cnn", "batch_norm", "digits"), (8, 8, 1))["params"]
    without = shapes_of(config_of("cnn", "none", "digits"), (8, 8, 1))["params"]
    no_offset = shapes_of(
        config_of("cnn", "batch_norm", "digits", norm__use_bias=False), (8, 8, 1)
    )["params"]
    assert "bias" not in with_norm["conv1"]
    assert "bias" in without["conv1"]
    assert "bias" in no_offset["conv1"]


@pytest.mark.parametrize(
    ("model", "norms"), [("mlp", NORMS), ("cnn", ["none", "layer_norm", "evonorm_b0", "dyt"])]
)
def test_variants_of_one_seed_share_the_initial_values_they_have_in_common(model, norms):
    def initial(norm, seed):
        net = build(config_of(model, norm, "digits"))
        params = net.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), train=False)["params"]
        return traverse_util.flatten_dict(params, sep="/")

    reference = initial("batch_norm", 0)
    for norm in norms:
        other = initial(norm, 0)
        kernels = [name for name in reference if name.endswith("kernel")]
        assert kernels
        assert all(name in other for name in kernels)
        for name in reference.keys() & other.keys():
            np.testing.assert_array_equal(reference[name], other[name])
    assert not np.array_equal(initial("none", 1)["head/kernel"], reference["head/kernel"])


def test_zero_initialized_scales_make_a_residual_branch_vanish():
    config = config_of("resnet20", model__zero_init_scale=True)
    net = build(config)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = net.init(jax.random.key(1), x, train=False)
    params = variables["params"]
    assert not np.any(params["stage1_block1"]["norm2"]["scale"])
    assert np.all(params["stage1_block1"]["norm1"]["scale"] == 1)
    # With empty branches, what any branch's convolution holds does not matter.
    params["stage1_block1"]["conv1"]["kernel"] *= 7.0
    changed = net.apply({**variables, "params": params}, x, train=False)
    fresh = net.apply(net.init(jax.random.key(1), x, train=False), x, train=False)
    np.testing.assert_array_equal(changed, fresh)


def test_evaluation_changes_nothing_and_training_changes_statistics():
    net = build(config_of("cnn", "batch_norm", "digits"))
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = net.init(jax.random.key(1), x, train=True)
    _, after_eval = net.apply(variables, x, train=False, mutable=["batch_stats"])
    _, after_train = net.apply(variables, x, train=True, mutable=["batch_stats"])
    before = variables["batch_stats"]["norm1"]["mean"]
    np.testing.assert_array_equal(after_eval["batch_stats"]["norm1"]["mean"], before)
    assert np.any(after_train["batch_stats"]["norm1"]["mean"] != before)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_statistics():
    net = build(config_of("resnet20", model__dtype="bfloat16"))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = net.init(jax.random.key(1), x, train=False)
    logits, updated = net.apply(
        variables,
        x,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    block = updated["intermediates"]["stage1_block1"]["conv1"]["__call__"][0]
    assert block.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    for leaf in jax.tree.leaves((variables, updated["batch_stats"])):
        assert leaf.dtype == jnp.float32


def test_layers_name_each_normalizer_and_what_became_of_its_groups():
    config = config_of("resnet20", "group_norm", norm__num_groups=24)
    layers = norm_layers(build(config), (32, 32, 3))
    assert len(layers) == 19
    assert layers[0].path == "norm_stem"
    assert layers[0].shape == (32, 32, 16)
    # The largest divisor of 16 that is at most 24 is 16; of 64 it is 16 as well.
    assert layers[0].note == "num_groups 24 does not divide 16 channels: 16 groups"
    assert layers[-1].note == "num_groups 24 does not divide 64 channels: 16 groups"
    eight = config_of("resnet20", "group_norm", norm__num_groups=8)
    assert not any(layer.note for layer in norm_layers(build(eight), (32, 32, 3)))

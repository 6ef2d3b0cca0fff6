"""VGG nets: parameter counts with their sources, the two forms of their head, small images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.config import load_config
from normlab.errors import UserError
from normlab.models import build, count_params
from normlab.training.setup import build_parts


def model_of(model, norm="none", data="cifar10", **fields):
    source = f"configs/{data}.py:model={model},norm={norm}"
    return build(load_config(source, {f"model.{name}": value for name, value in fields.items()}))


def shapes(net, image_shape):
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images)


# A group of n convolutions of c channels behind one of b: 9·b·c + c and n − 1 times 9·c² + c.
# VGG-11: 1,792 + 73,856 + 295,168 + 590,080 + 1,180,160 + 3·2,359,808 = 9,220,480, and a head of
# 513·10 = 5,130. VGG-13 has one more of 64 channels (36,928) and of 128 (147,584); VGG-16 beside
# those one more in each of the last three groups: 590,080 + 2·2,359,808; VGG-19 twice that.
VGG11 = 1_792 + 73_856 + 295_168 + 590_080 + 1_180_160 + 3 * 2_359_808
VGG13 = VGG11 + 36_928 + 147_584
MORE = 590_080 + 2 * 2_359_808
SMALL = {"vgg11": VGG11, "vgg13": VGG13, "vgg16": VGG13 + MORE, "vgg19": VGG13 + 2 * MORE}

# torchvision's, with 1,000 classes.
PUBLISHED = {
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
}
# Channels of all convolutions. torchvision's vgg*_bn have a scale and a bias for each more, and
# keep the convolution's bias, which here gives way to the normalizer's.
CHANNELS = {
    "vgg11": 64 + 128 + 2 * 256 + 4 * 512,
    "vgg13": 2 * 64 + 2 * 128 + 2 * 256 + 4 * 512,
    "vgg16": 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512,
    "vgg19": 2 * 64 + 2 * 128 + 4 * 256 + 8 * 512,
}
PUBLISHED_BN = {
    "vgg11": 132_868_840,
    "vgg13": 133_053_736,
    "vgg16": 138_365_992,
    "vgg19": 143_678_248,
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameter_counts_of_the_published_nets(model):
    net = model_of(model, data="imagenet", hidden_width=4096)
    assert count_params(shapes(net, (224, 224, 3))["params"]) == PUBLISHED[model]
    net = model_of(model, "batch_norm", "imagenet", hidden_width=4096)
    count = count_params(shapes(net, (224, 224, 3))["params"])
    assert count == PUBLISHED_BN[model] - CHANNELS[model]
    assert PUBLISHED_BN[model] - PUBLISHED[model] == 2 * CHANNELS[model]


@pytest.mark.parametrize("model", SMALL)
def test_parameter_counts_on_cifar(model):
    assert VGG11 == 9_220_480
    head = 513 * 10
    assert count_params(shapes(model_of(model), (32, 32, 3))["params"]) == SMALL[model] + head
    count = count_params(shapes(model_of(model, "batch_norm"), (32, 32, 3))["params"])
    assert count == SMALL[model] + head + CHANNELS[model]


def test_the_last_map_has_one_position_at_32_pixels_and_49_at_224():
    small, large = (
        shapes(model_of("vgg11", hidden_width=8), (side, side, 3))["params"]["dense1"]["kernel"]
        for side in (32, 224)
    )
    assert small.shape == (512, 8)
    assert large.shape == (49 * 512, 8)


@pytest.mark.parametrize("side", [1, 8, 28])
def test_small_images_go_through(side):
    # 28, 14, 7, 3, 1: the fifth pooling is left out, and of 8×8 the last two.
    net = model_of("vgg11")
    variables = shapes(net, (side, side, 3))
    images = jnp.zeros((2, side, side, 3))
    logits = jax.eval_shape(lambda v, x: net.apply(v, x, train=False), variables, images)
    assert logits.shape == (2, 10)


def test_dropout_acts_in_training_with_a_key_alone():
    net = model_of("vgg11", hidden_width=64, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(lambda x: net.init(jax.random.key(1), x, train=False))(x)
    still = net.apply(variables, x, train=False)
    np.testing.assert_array_equal(net.apply(variables, x, train=True), still)
    rngs = {"dropout": jax.random.key(2)}
    np.testing.assert_array_equal(net.apply(variables, x, train=False, rngs=rngs), still)
    assert np.any(net.apply(variables, x, train=True, rngs=rngs) != still)


@pytest.mark.parametrize(("field", "value"), [("hidden_width", -1), ("dropout", 1.5)])
def test_numbers_out_of_range_are_refused_in_one_line(field, value):
    config = load_config("configs/digits.py:model=vgg11", {f"model.{field}": value})
    with pytest.raises(UserError, match=rf"model\.{field}.*{value}") as error:
        build_parts(config, need_data=False)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "side", "rate"), [("none", 32, 0.002), ("batch_norm", 8, 0.02)])
def test_steps_along_the_gradient_lower_the_loss(norm, side, rate):
    net = model_of("vgg11", norm)
    x = jax.random.normal(jax.random.key(0), (8, side, side, 3))
    labels = jnp.arange(8)
    start = jax.jit(lambda x: net.init(jax.random.key(1), x, train=False))(x)
    params, state = start["params"], start.get("batch_stats", {})

    def loss(params):
        variables = {"params": params, "batch_stats": state}
        logits, _ = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), labels])

    gradient = jax.jit(jax.value_and_grad(loss))
    losses = []
    for _ in range(10):
        value, slope = gradient(params)
        losses.append(float(value))
        params = jax.tree.map(lambda p, g: p - rate * g, params, slope)
    assert losses[-1] < 0.6 * losses[0]

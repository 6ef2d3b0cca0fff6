"""Pre-activation blocks: counts, the variance of signals by depth, what is dropped and when."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from signal_nets import TORUS, moments, net_of, noise, signals, start

from normlab.config import load_config
from normlab.errors import UserError
from normlab.models import build, count_params
from normlab.models.conv import StandardConv
from normlab.models.drop import drop_branch, dropout
from normlab.models.layers import norm_layers
from normlab.models.nf_resnet import PreActResNet20
from normlab.models.signals import SIGNALS
from normlab.training.setup import build_parts

SMALL = {"width": 4, "stage_sizes": (2, 2)}


def model_of(source, **overrides):
    fields = {name.replace("__", "."): value for name, value in overrides.items()}
    return build(load_config(f"configs/{source}", fields))


def shapes_of(net, side):
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, x: net.init(k, x, train=False), key, images)["params"]


# Sum by hand, batch norm: stem 3·3·3·16 = 432. Stage 1: 6 convolutions 9·16·16 and 6 norms of 32.
# Stage 2: 9·16·32 + 5·9·32·32 and the shortcut's 16·32; its first norm is of the 16 channels
# before it, so 32 + 5·64. Stage 3: 9·32·64 + 5·9·64·64 and 32·64; norms 64 + 5·128. The last norm
# 128, the head 650. A further block a stage adds what it does to ResNet-20, 97,216.
PREACT20 = 432 + 6 * (2304 + 32) + 50_688 + 512 + 352 + 202_752 + 2048 + 704 + 128 + 650


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("preact_resnet20", PREACT20),
        ("preact_resnet32", PREACT20 + 2 * 97_216),
        ("preact_resnet56", PREACT20 + 6 * 97_216),
    ],
)
def test_parameter_counts_on_cifar(model, count):
    assert count_params(shapes_of(model_of(f"cifar10.py:model={model}"), 32)) == count


def test_preact_resnet50_has_resnet50s_parameters_but_for_the_norms_places():
    # torchvision's ResNet-50 has 25,557,032. It has a norm of 64 in the stem and one behind each
    # shortcut and each block's last convolution, which here stand before the first convolution.
    # Stream: 256, 512, 1024, 2048 channels with 3, 4, 6, 3 blocks.
    streams, blocks = (256, 512, 1024, 2048), (3, 4, 6, 3)
    there = 64 + sum((n + 1) * c for c, n in zip(streams, blocks, strict=True))
    before = (64, *streams)
    here = sum(before[i] + (n - 1) * streams[i] for i, n in enumerate(blocks)) + 2048
    net = model_of("imagenet.py:model=preact_resnet50")
    assert count_params(shapes_of(net, 64)) == 25_557_032 + 2 * (here - there)


def test_a_normalizer_stands_before_each_convolution_but_stem_and_shortcut():
    layers = {layer.path: layer.shape for layer in norm_layers(net_of(PreActResNet20), (8, 8, 3))}
    assert len(layers) == 2 * 9 + 1
    assert layers["stage2_block1/norm1"] == (8, 8, 16)  # of the stream before it
    assert layers["stage2_block1/norm2"] == (4, 4, 32)
    assert layers["norm_last"] == (2, 2, 64)


# Signals at the start -----------------------------------------------------------------------------

WIDE = {"conv": StandardConv(**TORUS), "width": 256, "stage_sizes": (3,)}


def test_with_batch_norm_the_stream_grows_by_1_a_block():
    # relu(z), z ~ N(0, 1), has mean square 1/2 and squared mean 1/(2π). Times He's weights of
    # variance 2/fan-in: a branch of mean square 1, of which 1/π is the square of channels' means.
    # The stem has variance 2, as its input has no relu before it.
    net = net_of(PreActResNet20, "batch_norm", **WIDE)
    found = list(moments(net, 3, (32, 8, 8, 256), train=True).values())
    for number, block in enumerate(found, 1):
        assert block["branch"][1] == pytest.approx(1 - 1 / math.pi, rel=0.01)
        assert block["stream"][1] == pytest.approx(2 + number * (1 - 1 / math.pi), rel=0.01)
        assert sum(block["stream"]) == pytest.approx(2 + number, rel=0.03)
    # Squared means vary more: by 3% over 256 channels, 3 blocks and 3 draws.
    mean_squares = [block["branch"][0] for block in found]
    assert sum(mean_squares) / 3 == pytest.approx(1 / math.pi, rel=0.08)


def test_without_normalizers_each_block_doubles_the_stream():
    # A He-initialized relu branch keeps the mean square: 2 of the stem becomes 4, 8, 16.
    found = moments(net_of(PreActResNet20, **WIDE), 3, (32, 8, 8, 256))
    for number, block in enumerate(found.values(), 1):
        assert sum(block["branch"]) == pytest.approx(2**number, rel=0.08)
        assert sum(block["stream"]) == pytest.approx(2 ** (number + 1), rel=0.08)


def test_signals_are_sown_only_on_demand_and_are_branch_and_sum():
    net, x = net_of(PreActResNet20, **SMALL), noise(0, (2, 8, 8, 3))
    variables = start(net, x)
    assert set(variables) == {"params"}
    _, nothing = net.apply(variables, x, train=False, mutable=["batch_stats"])
    assert SIGNALS not in nothing
    found = signals(net, variables, x)
    assert list(found) == ["stage1_block1", "stage1_block2", "stage2_block1", "stage2_block2"]
    before, block = found["stage1_block1"]["stream"], found["stage1_block2"]
    np.testing.assert_array_equal(block["stream"], before + block["branch"])


# Stochastic depth and dropout ---------------------------------------------------------------------


def test_a_branch_is_dropped_by_example_at_a_rate_that_rises_linearly():
    net = net_of(PreActResNet20, width=2, stage_sizes=(4,), stochastic_depth=0.8, alpha=0.5)
    x = noise(0, (4000, 4, 4, 3))
    variables = start(net, x)
    blocks = list(
        signals(net, variables, x, train=True, rngs={"dropout": jax.random.key(1)}).values()
    )
    for index in range(1, 4):
        added = blocks[index]["stream"] - blocks[index - 1]["stream"]
        dropped = np.abs(added).max((1, 2, 3)) == 0
        # 0.8·index/4; the deviation of 4,000 draws is at most 0.008.
        assert dropped.mean() == pytest.approx(0.2 * index, abs=0.03)
        # What stays is not rescaled: α times the branch.
        kept, branch = added[~dropped], blocks[index]["branch"][~dropped]
        np.testing.assert_allclose(kept, 0.5 * branch, rtol=1e-3, atol=1e-5)


def test_rescaling_divides_what_stays_by_its_chance():
    x = jnp.ones((10, 1, 1, 1))
    for rescale, size in ((False, 1.0), (True, 4.0)):
        y = jax.jit(net_of(Drop, rate=0.75, rescale=rescale).apply)
        y = y({}, x, rngs={"dropout": jax.random.key(0)})
        assert set(np.unique(y)) == {0.0, size}


class Drop(PreActResNet20):
    rate: float = 0.0
    rescale: bool = False

    def __call__(self, x):
        return drop_branch(self, x, self.rate, rescale=self.rescale, train=True, axis_name=None)


class DropValues(Drop):
    def __call__(self, x):
        return dropout(self, x, self.rate, train=True, axis_name=None)


def test_dropout_is_by_value_and_keeps_the_mean():
    x = jnp.ones((100, 400))
    y = net_of(DropValues, rate=0.2).apply({}, x, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(y)) == {0.0, 1.25}
    assert float((y == 0).mean()) == pytest.approx(0.2, abs=0.01)  # its deviation is 0.002


@pytest.mark.parametrize("field", ["stochastic_depth", "dropout"])
def test_dropping_follows_the_key_and_needs_one_and_training(field):
    x = noise(0, (8, 8, 8, 3))
    never, net = net_of(PreActResNet20, **SMALL), net_of(PreActResNet20, **SMALL, **{field: 0.5})
    variables = start(net, x)

    def logits(net, train, *key):
        rngs = {"dropout": jax.random.key(key[0])} if key else {}
        return np.asarray(net.apply(variables, x, train=train, rngs=rngs))

    plain = logits(never, True)
    np.testing.assert_array_equal(logits(net, True), plain)  # training without a key
    np.testing.assert_array_equal(logits(net, False, 1), plain)  # a key without training
    once, again, other = (logits(net, True, key) for key in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, plain)
    assert not np.allclose(once, other)


# Choices ------------------------------------------------------------------------------------------


def test_same_padding_at_a_stride_is_another_network():
    x = noise(0, (1, 8, 8, 3))
    nets = [net_of(PreActResNet20, **SMALL, padding=kind) for kind in ("symmetric", "same")]
    variables = start(nets[0], x)
    a, b = (signals(net, variables, x) for net in nets)
    np.testing.assert_array_equal(a["stage1_block2"]["stream"], b["stage1_block2"]["stream"])
    assert not np.allclose(a["stage2_block1"]["branch"], b["stage2_block1"]["branch"])


@pytest.mark.slow
def test_bfloat16_stays_in_the_stream():
    net = net_of(PreActResNet20, **SMALL, dtype="bfloat16", skip_gain=1.0, squeeze_excite=0.5)
    x = noise(0, (2, 8, 8, 3))
    variables = start(net, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    found = signals(net, variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    assert net.apply(variables, x, train=False).dtype == jnp.float32


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("nf_resnet20", {"model.beta": "befor"}, "unknown 'model.beta' 'befor'; did you mean 'bef"),
        ("nf_resnet20", {"model.gain": "exakt"}, "unknown 'model.gain' 'exakt'; did you mean 'exa"),
        ("nf_resnet20", {"model.padding": "sam"}, "unknown 'model.padding' 'sam'; did you mean"),
        ("nf_resnet20", {"model.downsample": "pol"}, "unknown 'model.downsample' 'pol'; did you"),
        ("nf_resnet20", {"model.alpha": -1.0}, "'model.alpha' = -1.0 must be 0.0 or more"),
        ("nf_resnet20", {"model.stochastic_depth": 1.0}, "must be from 0.0 to 0.99"),
        ("nf_resnet20", {"model.dropout": 1.5}, "'model.dropout' = 1.5 must be from 0.0 to 0.99"),
        ("nf_resnet20", {"model.squeeze_excite": 1.5}, "must be from 0.0 to 1.0"),
        ("deep_mlp", {"model.depth": 10_001}, "'model.depth' = 10001 must be from 1 to 10000"),
        ("wide_resnet", {"model.depth": 27}, "'model.depth' = 27 is not 6n + 4; nearest: 28"),
        ("wide_resnet", {"model.depth": 2}, "'model.depth' = 2 is not 6n + 4; nearest: 10"),
        (
            "nfnet_f0",
            {"model.widths": (64, 512, 1536, 1536)},
            "'model.group_width' = 128 is more than the 32 channels of a branch; nearest: 32",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(model, fields, message):
    with pytest.raises(UserError) as refused:
        build_parts(load_config(f"configs/cifar10.py:model={model}", fields), need_data=False)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)

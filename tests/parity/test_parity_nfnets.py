"""DeepMind's NFNets by Haiku: the names it gives, files by dill, and the same logits.

The net is written anew here, with the official code's nesting of modules (deepmind-research/nfnets:
which module makes which in its constructor, under which name), since that is what the names in the
published files come from.
"""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

hk = pytest.importorskip("haiku", reason="parity: dm-haiku is not installed")

from normlab.config import load_config  # noqa: E402
from normlab.interop import deepmind_nfnets  # noqa: E402
from normlab.models import build  # noqa: E402

pytestmark = pytest.mark.parity

GAMMA = 1.7015043497085571  # of gelu, as released


def act(x):
    return jax.nn.gelu(x) * GAMMA


class Conv(hk.Module):
    """A convolution of scaled weight standardization, padded as SAME."""

    def __init__(self, features, size, name, stride=1, groups=1):
        super().__init__(name=name)
        self.features, self.size, self.stride, self.groups = features, size, stride, groups

    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = hk.get_parameter("w", shape, init=hk.initializers.RandomNormal())
        gain = hk.get_parameter("gain", shape[-1:], init=jnp.ones)
        bias = hk.get_parameter("bias", shape[-1:], init=jnp.zeros)
        centered = kernel - kernel.mean((0, 1, 2))
        square = jnp.maximum(centered.var((0, 1, 2)) * math.prod(shape[:3]), 1e-4)
        return bias + jax.lax.conv_general_dilated(
            x,
            centered / jnp.sqrt(square) * gain,
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


class SqueezeExcite(hk.Module):
    """Gates; both layers have the name that Haiku gives them."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = hk.Linear(channels // 2), hk.Linear(channels)

    def __call__(self, x):
        hidden = jax.nn.relu(self.first(x.mean((1, 2))))
        return jax.nn.sigmoid(self.second(hidden))[:, None, None]


class NFBlock(hk.Module):
    """A block; it has the name that Haiku gives it."""

    def __init__(self, inputs, outputs, stride, group, deviation):
        super().__init__()
        self.stride, self.deviation = stride, deviation
        inner, groups = outputs // 2, outputs // 2 // group
        self.conv0 = Conv(inner, 1, "conv0")
        self.conv1 = Conv(inner, 3, "conv1", stride, groups)
        self.conv1b = Conv(inner, 3, "conv1b", 1, groups)
        self.conv2 = Conv(outputs, 1, "conv2")
        self.projects = stride > 1 or inputs != outputs
        if self.projects:
            self.conv_shortcut = Conv(outputs, 1, "conv_shortcut")
        self.gates = SqueezeExcite(outputs)

    def __call__(self, x):
        y = act(x) / self.deviation
        if self.projects:
            window = (1, self.stride, self.stride, 1)
            x = self.conv_shortcut(hk.avg_pool(y, window, window, "SAME"))
        y = self.conv2(act(self.conv1b(act(self.conv1(act(self.conv0(y)))))))
        gain = hk.get_parameter("skip_gain", (), init=jnp.zeros)
        return x + 0.2 * gain * 2 * self.gates(y) * y


class NFNet(hk.Module):
    """The net, called NFNet as the official one."""

    def __init__(self, depths, widths, group, classes):
        super().__init__(name="NFNet")
        stem = zip((16, 32, 64, widths[0] // 2), (2, 1, 1, 2), strict=True)
        self.stem = [
            Conv(features, 3, f"stem_conv{i}", stride) for i, (features, stride) in enumerate(stem)
        ]
        self.blocks, inputs, variance = [], widths[0] // 2, 1.0
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(NFBlock(inputs, width, stride, group, math.sqrt(variance)))
                variance = (1.0 if block == 0 else variance) + 0.2**2
                inputs = width
        self.final_conv = Conv(2 * inputs, 1, "final_conv")
        self.head = hk.Linear(classes)

    def __call__(self, x):
        for number, conv in enumerate(self.stem):
            x = conv(act(x) if number else x)
        for block in self.blocks:
            x = block(x)
        return self.head(act(self.final_conv(x)).mean((1, 2)))


def haiku_net(*settings):
    return hk.without_apply_rng(hk.transform(lambda x: NFNet(*settings)(x)))


NARROW = ((1, 2, 6, 3), (16, 24, 32, 32), 4, 10)
FIELDS = {"model.gain": "released", "model.widths": NARROW[1], "model.group_width": 4}


def random_tree(net, side):
    """Parameters that are nowhere as they start, gains of branches included."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("gain", "skip_gain"):
            return np.asarray(rng.uniform(0.5, 1.5, leaf.shape), "f4")
        # Linear layers keep their input's size; standardized weights do so whatever they are.
        scale = 1 / math.sqrt(leaf.shape[0]) if leaf.ndim == 2 else 1.0
        return np.asarray(rng.normal(size=leaf.shape) * scale, "f4")

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("side", [64, 75])  # odd sizes are padded elsewhere
def test_logits_agree(tmp_path, side):
    net = haiku_net(*NARROW)
    tree = random_tree(net, side)
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(pickle.dumps(tree))
    config = load_config("configs/cifar10.py:model=nfnet_f0", FIELDS)
    variables = deepmind_nfnets.load(path, config)
    model = build(config)
    x = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype("f4")
    found = np.asarray(jax.jit(lambda v: model.apply(v, x, train=False))(variables))
    expected = np.asarray(jax.jit(net.apply)(tree, x))
    scale = np.abs(expected).max()
    assert scale > 0.1
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)


@pytest.mark.parametrize("number", range(7))
def test_names_and_shapes_of_all_variants_are_haikus(number):
    depths = tuple(blocks * (number + 1) for blocks in (1, 2, 6, 3))
    net = haiku_net(depths, (256, 512, 1536, 1536), 128, 10)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert len(shapes) == 94 + 84 * number  # modules
    # Arrays of one number, whatever their shape: F6 is 1.7 GB.
    tree = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    assert deepmind_nfnets.variant_of(tree) == f"nfnet_f{number}"
    source = f"configs/cifar10.py:model=nfnet_f{number}"
    variables = deepmind_nfnets.variables(tree, load_config(source, {"model.gain": "released"}))
    # 71,489,284 with 1,000 classes, and 61,144,972 for each further variant.
    count = sum(value.size for value in jax.tree.leaves(variables))
    assert count == 71_489_284 - 990 * 3073 + number * 61_144_972


def test_a_file_by_dill_is_read(tmp_path):
    dill = pytest.importorskip("dill", reason="parity: dill is not installed")
    tree = {"NFNet/~/linear": {"w": np.arange(6, dtype="f4").reshape(2, 3), "b": np.float32(2)}}
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(dill.dumps(tree))
    assert b"_create_array" in path.read_bytes()
    found = deepmind_nfnets.read(path)
    np.testing.assert_array_equal(found["NFNet/~/linear"]["w"], tree["NFNet/~/linear"]["w"])
    assert found["NFNet/~/linear"]["b"] == 2

"""NFNets and NF-RegNets: parameters, multiply-accumulates, and the released definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from signal_nets import net_of, noise, signals, start
from test_nf_resnet import apply_conv, drawn

from normlab.config import load_config
from normlab.errors import UserError
from normlab.models import build, count_params
from normlab.models.activations import RELEASED_GAINS
from normlab.models.cost import macs
from normlab.models.nf_regnet import NFRegNetB0
from normlab.models.nfnet import NFNetF0
from normlab.models.weight_space import ScaledWeightStandardization
from normlab.training.setup import build_parts


def model_of(name, **fields):
    overrides = {f"model.{field}": value for field, value in fields.items()}
    return build(load_config(f"configs/imagenet.py:model={name}", overrides))


def count_of(net, side=64):
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda k, x: net.init(k, x, train=False), key, images)
    return count_params(shapes["params"])


def slow_but(values, fast):
    return [pytest.param(x, marks=[] if x in fast else [pytest.mark.slow]) for x in values]


@pytest.mark.parametrize("variant", slow_but(range(8), (0, 1, 7)))
def test_parameters_of_nfnets(variant):
    # Brock et al. 2021b, table 6: 71.5M, 132.6M, 193.8M, 254.9M, 316.1M, 377.2M, 438.4M.
    assert count_of(model_of(f"nfnet_f{variant}")) == 71_489_284 + variant * 61_144_972


PIXELS_AND_BILLIONS = [
    (256, 12.38),
    (320, 35.54),
    (352, 62.59),
    (416, 114.76),
    (512, 215.24),
    (544, 289.76),
    (576, 377.28),
]


@pytest.mark.parametrize("variant", slow_but(range(7), (0,)))
def test_multiply_accumulates_of_nfnets_are_the_papers(variant):
    side, billions = PIXELS_AND_BILLIONS[variant]
    count = macs(model_of(f"nfnet_f{variant}"), (side, side, 3))
    assert count / 1e9 == pytest.approx(billions, abs=0.005)


def test_dropout_of_nfnets_rises_with_size():
    rates = [model_of(f"nfnet_f{variant}").dropout for variant in range(8)]
    assert rates == [0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5]


def test_the_papers_ablation_by_fields():
    # Without its second 3×3 a branch has 9·128·w fewer kernel numbers, w inner channels, and 2·w
    # fewer gains and biases; w is half of 256, 512, 1536 and 1536, with 1, 2, 6 and 3 blocks.
    whole, single = model_of("nfnet_f0"), model_of("nfnet_f0", second_conv=False)
    inner = 1 * 128 + 2 * 256 + 9 * 768
    assert count_of(whole) - count_of(single) == inner * (9 * 128 + 2)
    narrow = model_of("nfnet_f0", widths=(256, 512, 1024, 2048))
    wide = model_of("nfnet_f0", widths=(384, 768, 2048, 2048))  # F0+ of the released code
    assert count_of(narrow) != count_of(whole) < count_of(wide)


# The released definitions -------------------------------------------------------------------------


def gated(p, x):
    hidden = x.mean((1, 2)) @ p["squeeze"]["kernel"] + p["squeeze"]["bias"]
    gates = jnp.maximum(hidden, 0) @ p["excite"]["kernel"] + p["excite"]["bias"]
    return 2 * jax.nn.sigmoid(gates)[:, None, None] * x


def halved(x):
    """Means over 2×2 pixels; at an odd side the last ones are over fewer."""

    def total(x):
        return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")

    return total(x) / total(jnp.ones_like(x))


def block(p, x, act, beta, strides, groups, excite_inside):
    """A block of nfnets/nfnet.py, or (with `excite_inside`) of nf_regnet.py."""
    out = act(x) / beta
    shortcut = x
    if "conv_shortcut" in p:
        shortcut = apply_conv(p["conv_shortcut"], halved(out) if strides == 2 else out)
    out = apply_conv(p["conv1"], out)
    out = apply_conv(p["conv2"], act(out), strides, groups)
    if "conv4" in p:
        out = apply_conv(p["conv3"], act(out), 1, groups)
    if excite_inside:
        out = gated(p["squeeze_excite"], out)
    out = apply_conv(p["conv4" if "conv4" in p else "conv3"], act(out))
    if not excite_inside:
        out = gated(p["squeeze_excite"], out)
    return shortcut + 0.2 * p["skip_gain"] * out


def head(params, x, act):
    x = act(apply_conv(params["conv_final"], x)).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def nfnet(params, x):
    """Two stages of two blocks, 16 and 32 channels, 4 a group."""

    def act(x):
        return jax.nn.gelu(x) * RELEASED_GAINS["gelu"]

    for number, strides in enumerate((2, 1, 1, 2), 1):
        x = apply_conv(params[f"conv_stem{number}"], x if number == 1 else act(x), strides)
    for name, variance, strides, groups in (
        ("stage1_block1", 1.0, 1, 2),
        ("stage1_block2", 1.04, 1, 2),
        ("stage2_block1", 1.08, 2, 4),
        ("stage2_block2", 1.04, 1, 4),
    ):
        x = block(params[name], x, act, variance**0.5, strides, groups, False)
    return head(params, x, act)


def nf_regnet(params, x):
    """Two stages of two blocks, 16 and 24 channels, 8 a group."""

    def act(x):
        return jax.nn.silu(x) * RELEASED_GAINS["silu"]

    x = apply_conv(params["conv_stem"], x, 2)
    for name, variance, strides, groups in (
        ("stage1_block1", 1.0, 2, 2),  # 16 channels inside
        ("stage1_block2", 1.04, 1, 4),  # 16·2.25 = 36, of which 32
        ("stage2_block1", 1.08, 2, 4),
        ("stage2_block2", 1.04, 1, 6),  # 24·2.25 = 54, of which 48
    ):
        x = block(params[name], x, act, variance**0.5, strides, groups, True)
    return head(params, x, act)


SMALL = {"stage_sizes": (2, 2), "gain": "released", "conv": ScaledWeightStandardization()}
NETS = {
    "nfnet": (nfnet, NFNetF0, SMALL | {"widths": (16, 32), "group_width": 4}),
    "single": (
        nfnet,
        NFNetF0,
        SMALL | {"widths": (16, 32), "group_width": 4, "second_conv": False},
    ),
    "nf_regnet": (nf_regnet, NFRegNetB0, SMALL | {"widths": (16, 24)}),
}


@pytest.mark.parametrize("name", NETS)
def test_it_is_the_released_network(name):
    reference, cls, fields = NETS[name]
    net, x = net_of(cls, **fields), noise(0, (2, 22, 22, 3))  # sides 11, 6, 3 within
    variables = drawn(net, x)
    found = jax.jit(lambda v: net.apply(v, x, train=False))(variables)
    expected = jax.jit(lambda v: reference(v["params"], x))(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_blocks_that_keep_the_shape_start_as_the_identity():
    _, cls, fields = NETS["nfnet"]
    net, x = (
        net_of(cls, **fields | {"stage_sizes": (2,), "widths": (16,)}),
        noise(0, (2, 16, 16, 3)),
    )
    found = signals(net, start(net, x), x)
    np.testing.assert_array_equal(
        found["stage1_block1"]["stream"], found["stage1_block2"]["stream"]
    )


@pytest.mark.parametrize("model", ["nfnet_f0", "nf_regnet_b0"])
@pytest.mark.parametrize("widths", [(16, 32, 32), (16, 32, 32, 32, 32)])
def test_a_stage_without_a_width_is_refused_in_one_line(model, widths):
    config = load_config(f"configs/cifar10.py:model={model}", {"model.widths": widths})
    with pytest.raises(UserError) as error:
        build_parts(config, need_data=False)
    line = str(error.value)
    assert line.startswith(f"config field 'model.widths' = {widths} has {len(widths)} numbers")
    assert "'model.stage_sizes' = " in line
    assert "\n" not in line


# NF-RegNets ---------------------------------------------------------------------------------------


def regnet_count(depths, widths, final):
    """Sum over layers by the released definition; a layer has in/groups·k²·out kernels, 2·out."""

    def layer(inputs, out, size=1):
        return inputs * size**2 * out + 2 * out

    total, before = layer(3, widths[0], 3), widths[0]
    for stage, (depth, out) in enumerate(zip(depths, widths, strict=True)):
        for number in range(depth):
            inner = before if stage + number == 0 else before * 9 // 4
            inner -= inner % 8
            total += layer(before, inner) + layer(8, inner, 3) + layer(inner, out)
            half = inner // 2  # the gates' two dense layers, with biases
            total += inner * half + half + half * inner + inner
            total += layer(before, out) if number == 0 else 0  # every stage has stride 2
            total += 1
            before = out
    return total + layer(before, final) + (final + 1) * 1000


@pytest.mark.parametrize(
    ("variant", "depths", "widths", "final"),
    [  # deepmind-research/nfnets/base.py, widths times 0.75; final: 1280/440 of the last one
        ("b0", (1, 3, 6, 6), (36, 78, 156, 330), 960),
        ("b1", (2, 4, 7, 7), (36, 78, 156, 330), 960),
        ("b2", (2, 4, 8, 8), (42, 84, 174, 366), 1064),
        ("b3", (2, 5, 9, 9), (42, 96, 186, 396), 1152),
        ("b4", (2, 6, 11, 11), (48, 108, 216, 462), 1344),
        ("b5", (3, 7, 14, 14), (60, 126, 252, 528), 1536),
    ],
)
def test_parameters_of_nf_regnets(variant, depths, widths, final):
    net = model_of(f"nf_regnet_{variant}")
    assert count_of(net) == regnet_count(depths, widths, final)
    assert net.head_deviation == 0


def regnet_macs(depths, widths, final, side):
    """The same sum for one image: kernels times the pixels behind them; every stage has stride 2.

    The first 1×1 of a block stands before the stride, its shortcut's 1×1 behind the average.
    """
    side //= 2
    total, before = side**2 * 9 * 3 * widths[0], widths[0]
    for stage, (depth, out) in enumerate(zip(depths, widths, strict=True)):
        for number in range(depth):
            inner = before if stage + number == 0 else before * 9 // 4
            inner -= inner % 8
            total += side**2 * before * inner
            side = side // 2 if number == 0 else side
            total += side**2 * (9 * 8 * inner + inner * out + (before * out if number == 0 else 0))
            total += 2 * inner * (inner // 2)  # the gates, once an image
            before = out
    return total + side**2 * before * final + final * 1000


def test_multiply_accumulates_of_nf_regnet_b0():
    count = macs(model_of("nf_regnet_b0"), (224, 224, 3))
    assert count == regnet_macs((1, 3, 6, 6), (36, 78, 156, 330), 960, 224)
    assert count / 1e9 == pytest.approx(0.444, abs=0.0005)

"""NF-ResNets: counts, expected deviations, variances at the start, and the released definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import lax
from signal_nets import TORUS, moments, net_of, noise, signals, start

from normlab.config import load_config
from normlab.models import build, count_params, default_choices
from normlab.models.activations import RELEASED_GAINS
from normlab.models.nf_resnet import NFResNet20, NFResNet26
from normlab.models.preact import expected_deviations
from normlab.models.weight_space import ScaledWeightStandardization
from normlab.optim import roles

SMALL = {"width": 4, "stage_sizes": (2, 2), "conv": ScaledWeightStandardization()}


TORUS_WS = ScaledWeightStandardization(**TORUS)


def config_of(model, data="cifar10", **choices):
    more = "".join(f",{key}={value}" for key, value in choices.items())
    return load_config(f"configs/{data}.py:model={model}{more}")


def params_of(model, side, data="cifar10", **choices):
    net = build(config_of(model, data, **choices))
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, x: net.init(k, x, train=False), key, images)["params"]


# A pre-activation net's convolutions, each with a gain and a bias for each output (conv_stem 16;
# 2·16 a block in stage 1, 2·32 and 2·64 in the others, and the shortcuts' 32 and 64), a skip gain
# a block, and no norms. ResNet-20: 2·(16 + 96 + 192 + 384 + 96) = 1,568 and 9.
KERNELS = 432 + 6 * 2304 + 50_688 + 512 + 202_752 + 2048  # as of preact_resnet20
BLOCKS = 2 * (2304 + 9216 + 36_864)  # of one more block a stage


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("nf_resnet20", KERNELS + 1568 + 9 + 650),
        ("nf_resnet32", KERNELS + 2 * BLOCKS + 1568 + 2 * 448 + 15 + 650),
        ("nf_resnet56", KERNELS + 6 * BLOCKS + 1568 + 6 * 448 + 27 + 650),
    ],
)
def test_parameter_counts_on_cifar(model, count):
    assert count_params(params_of(model, 32)) == count


def further(stage, blocks):
    """Parameters of further blocks of a stage (from 0): kernels, gains and biases, a skip gain."""
    inner = 64 * 2**stage
    kernels = 4 * inner**2 + 9 * inner**2 + 4 * inner**2
    return blocks * (kernels + 2 * (inner + inner + 4 * inner) + 1)


RESNET50 = 25_557_032  # torchvision's, and likewise 44,549,160 and 60,192,808


@pytest.mark.parametrize(
    ("model", "count"),
    [  # batch norm's scale and offset are a gain and a bias here; and a skip gain for each block
        ("nf_resnet50", RESNET50 + 16),
        ("nf_resnet101", 44_549_160 + 33),
        ("nf_resnet152", 60_192_808 + 50),
        ("nf_resnet26", RESNET50 + 16 - sum(further(i, n) for i, n in enumerate((1, 2, 4, 1)))),
        ("nf_resnet200", 60_192_808 + 50 + further(1, 16)),
        (
            "nf_resnet288",
            RESNET50 + 16 + sum(further(i, n) for i, n in enumerate((21, 20, 18, 21))),
        ),
    ],
)
def test_parameter_counts_on_imagenet(model, count):
    assert count_params(params_of(model, 64, "imagenet")) == count


# Pairs --------------------------------------------------------------------------------------------


def test_the_normalizer_free_net_differs_in_its_choices_alone():
    assert default_choices("nf_resnet20") == {
        "norm": "none",
        "conv": "scaled_weight_standardization",
    }
    nf, bn = config_of("nf_resnet20"), config_of("preact_resnet20")
    assert (nf.norm.kind, nf.conv.kind) == ("none", "scaled_weight_standardization")
    assert (bn.norm.kind, bn.conv.kind) == ("batch_norm", "standard")
    changed = {key for key in bn.model if nf.model[key] != bn.model[key]}
    assert changed == {"kind", "alpha", "beta", "skip_gain", "gain"}
    assert config_of("nf_resnet20", norm="batch_norm").norm.kind == "batch_norm"


def test_a_pair_of_one_seed_has_the_same_kernels_up_to_the_initializers_scale():
    def flat(model):
        fields = {"model.stage_sizes": (1, 1, 1)}
        net = build(load_config(f"configs/cifar10.py:model={model}", fields))
        params = start(net, jnp.zeros((1, 8, 8, 3)))["params"]
        return traverse_util.flatten_dict(params, sep="/")

    nf, bn = flat("nf_resnet20"), flat("preact_resnet20")
    kernels = [name for name in bn if name.endswith("kernel")]
    assert len(kernels) == 1 + 6 + 2 + 1
    for name in kernels:
        # Variances 1/fan-in and 2/fan-in of the same draws; the heads' are the same.
        factor = 1 if name == "head/kernel" else math.sqrt(2)
        np.testing.assert_allclose(bn[name], factor * nf[name], rtol=1e-5)
    assert float(jnp.std(bn["head/kernel"])) == pytest.approx(0.01, rel=0.1)


# Variances ----------------------------------------------------------------------------------------


def test_expected_deviations_by_hand():
    # α² = 0.04. A stage's first block is divided by what came before, and the next one by √1.04.
    found = expected_deviations((3, 2, 2), 0.2)
    squares = [[1, 1.04, 1.08], [1.12, 1.04], [1.08, 1.04]]
    for stage, expected in zip(found, squares, strict=True):
        np.testing.assert_allclose(stage, np.sqrt(expected), atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"alpha": 0.5}])
def test_variance_is_1_on_the_branch_and_grows_by_alpha_squared_on_the_stream(fields):
    alpha = fields.get("alpha", 0.2)
    net = net_of(NFResNet20, width=256, stage_sizes=(3,), skip_gain=1.0, conv=TORUS_WS, **fields)
    found = moments(net, 3, (32, 8, 8, 256))
    for number, block in enumerate(found.values(), 1):
        assert block["branch"][1] == pytest.approx(1, rel=0.01)
        assert block["stream"][1] == pytest.approx(1 + number * alpha**2, rel=0.01)


@pytest.mark.slow
def test_the_sum_starts_from_1_again_at_a_stage():
    net = net_of(NFResNet20, width=256, stage_sizes=(2, 2), skip_gain=1.0, conv=TORUS_WS)
    found = moments(net, 3, (32, 8, 8, 256))
    for name, variance in (("stage2_block1", 1.04), ("stage2_block2", 1.08)):
        assert found[name]["stream"][1] == pytest.approx(variance, rel=0.01)


@pytest.mark.slow
def test_undivided_a_branch_has_the_variance_of_the_stream():
    # Of α = 1: 1, 2, 4, since relu is homogeneous.
    fields = {"skip_gain": 1.0, "conv": TORUS_WS, "beta": "none", "alpha": 1.0}
    found = moments(net_of(NFResNet20, width=256, stage_sizes=(3,), **fields), 3, (32, 8, 8, 256))
    for number, block in enumerate(found.values()):
        assert block["branch"][1] == pytest.approx(2**number, rel=0.03)


@pytest.mark.slow
def test_behind_or_before_the_activation_is_one_for_relu_and_not_for_tanh():
    x = noise(0, (2, 8, 8, 3))
    for activation, equal in ((jax.nn.relu, True), (jnp.tanh, False)):
        behind = net_of(NFResNet20, **SMALL, activation=activation, skip_gain=1.0, alpha=1.0)
        variables = start(behind, x)
        a, b = (
            signals(net, variables, x)["stage2_block2"]["stream"]
            for net in (behind, behind.clone(beta="before"))
        )
        assert np.allclose(a, b, rtol=1e-3, atol=1e-6) is equal


def test_with_a_skip_gain_of_0_a_block_is_the_identity_unless_the_shape_changes():
    x = noise(0, (2, 8, 8, 3))
    net = net_of(NFResNet20, **SMALL)
    variables = start(net, x)
    assert variables["params"]["stage1_block1"]["skip_gain"] == 0
    found = signals(net, variables, x)
    one, two, three, four = (block["stream"] for block in found.values())
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(three, four)
    assert float(jnp.abs(found["stage1_block2"]["branch"]).max()) > 0.1
    # And any branch may hold anything.
    variables["params"]["stage2_block2"]["conv1"]["gain"] *= 7.0
    np.testing.assert_array_equal(signals(net, variables, x)["stage2_block2"]["stream"], four)


# The released definition --------------------------------------------------------------------------


def standardized(conv):
    """(W − μ)·gain/√max(N·σ², 10⁻⁴), N the fan-in (nfnets/base.py)."""
    w = conv["kernel"]
    fan_in = math.prod(w.shape[:3])
    w = w - w.mean((0, 1, 2))
    return w * conv["gain"] / jnp.sqrt(jnp.maximum(fan_in * w.var((0, 1, 2)), 1e-4))


def apply_conv(conv, x, strides=1, groups=1):
    y = lax.conv_general_dilated(
        x,
        standardized(conv),
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + conv["bias"]


def drawn(net, x):
    """Parameters that hold something everywhere, gains, biases and skip gains too."""
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0.3, 0.5, s.shape), s.dtype), shapes)


def reference(params, x, stage_sizes, excite):
    """NF-ResNet of bottlenecks as in deepmind-research/nfnets/nf_resnet.py."""

    def act(x):
        return jnp.maximum(x, 0) * RELEASED_GAINS["relu"]

    x = apply_conv(params["conv_stem"], x, 2)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    variance = 1.0
    for stage, blocks in enumerate(stage_sizes, 1):
        for block in range(1, blocks + 1):
            p = params[f"stage{stage}_block{block}"]
            strides = 2 if stage > 1 and block == 1 else 1
            out = act(x) / variance**0.5
            shortcut = apply_conv(p["conv_shortcut"], out, strides) if block == 1 else x
            out = apply_conv(p["conv1"], out)
            out = apply_conv(p["conv2"], act(out), strides)
            out = apply_conv(p["conv3"], act(out))
            if excite:
                gate = p["squeeze_excite"]
                hidden = out.mean((1, 2)) @ gate["squeeze"]["kernel"] + gate["squeeze"]["bias"]
                gates = jnp.maximum(hidden, 0) @ gate["excite"]["kernel"] + gate["excite"]["bias"]
                out = 2 * jax.nn.sigmoid(gates)[:, None, None] * out
            x = shortcut + 0.2 * p["skip_gain"] * out
            variance = (1 if block == 1 else variance) + 0.2**2
    return act(x).mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(("excite", "side"), [(0.25, 16), (0.0, 17)])
def test_it_is_the_released_network(excite, side):
    x = noise(0, (2, side, side, 3))
    net = net_of(
        NFResNet26,
        width=4,
        stage_sizes=(2, 2),
        gain="released",
        squeeze_excite=excite,
        conv=ScaledWeightStandardization(),
    )
    variables = drawn(net, x)

    def logits(net):
        return jax.jit(lambda v: net.apply(v, x, train=False))(variables)

    expected = jax.jit(lambda v: reference(v["params"], x, (2, 2), excite))(variables)
    np.testing.assert_allclose(logits(net), expected, rtol=1e-3, atol=1e-3)
    symmetric = logits(net.clone(padding="symmetric"))
    # XLA's padding is one-sided where the side is even, and at a stride only.
    assert np.allclose(symmetric, expected, rtol=1e-3, atol=1e-3) is (side == 17)


def test_a_skip_gain_is_no_kernel_and_its_block_no_normalizer():
    found = roles(params_of("nf_resnet20", 8))
    block = found["stage2_block1"]
    assert block["skip_gain"] != "kernel"
    assert block["conv_shortcut"] == {"kernel": "kernel", "gain": "norm_scale", "bias": "bias"}

"""Fixup ResNets: counts, the identity at the start, the scale of the start, and that they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from normlab.config import load_config
from normlab.models import build, count_params
from normlab.models.activations import relu
from normlab.models.fixup import FixupBlock
from normlab.models.signals import SIGNALS


def model_of(model="fixup_resnet20", data="cifar10", **fields):
    source = f"configs/{data}.py:model={model}"
    return build(load_config(source, {f"model.{name}": value for name, value in fields.items()}))


def initial(net, x, seed=1):
    return jax.jit(lambda x: net.init(jax.random.key(seed), x, train=False))(x)


def shapes(net, image_shape):
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images)


@pytest.mark.parametrize(
    ("model", "blocks", "with_norm"),
    [
        ("fixup_resnet20", 9, 269_722),
        ("fixup_resnet32", 15, 464_154),
        ("fixup_resnet56", 27, 853_018),
        ("fixup_resnet110", 54, 1_727_962),
    ],
)
def test_parameter_counts_on_cifar(model, blocks, with_norm):
    # Of ResNet-20, -32, ... with batch norm (tests/models/test_models.py) without the norms: 32 of
    # the stem and, in a third of the blocks each, 2·32, 2·64 and 2·128. Then five scalars a block
    # and two of the net.
    norms = 32 + blocks // 3 * (2 * 32 + 2 * 64 + 2 * 128)
    count = count_params(shapes(model_of(model), (32, 32, 3))["params"])
    assert count == with_norm - norms + 5 * blocks + 2


@pytest.mark.parametrize(
    ("model", "blocks", "kernels"),
    [("fixup_resnet50", 16, 25_503_912), ("fixup_resnet101", 33, 44_443_816)],
)
def test_parameter_counts_on_imagenet(model, blocks, kernels):
    # torchvision's 25,557,032 and 44,549,160 without their 53,120 and 105,344 numbers of batch
    # norm; seven scalars a block and two of the net.
    assert kernels in (25_557_032 - 53_120, 44_549_160 - 105_344)
    count = count_params(shapes(model_of(model, "imagenet"), (224, 224, 3))["params"])
    assert count == kernels + 7 * blocks + 2


def test_a_net_has_no_normalizer_and_no_state_unless_one_is_chosen():
    config = load_config("configs/cifar10.py:model=fixup_resnet20")
    assert config.norm.kind == "none"
    assert set(shapes(build(config), (32, 32, 3))) == {"params"}
    chosen = load_config("configs/cifar10.py:model=fixup_resnet20,norm=batch_norm")
    assert "batch_stats" in shapes(build(chosen), (32, 32, 3))


def signals(net, variables, x):
    apply = jax.jit(lambda v: net.apply(v, x, train=True, mutable=[SIGNALS]))
    _, seen = apply(variables)
    return {name: part["stream"][0] for name, part in seen[SIGNALS].items()}


def test_each_block_starts_as_the_identity_on_the_stream():
    net = model_of(stage_sizes=(2, 2, 2))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = initial(net, x)
    streams = signals(net, variables, x)
    before = streams.pop("stage1_block1")
    assert np.all(np.asarray(before) >= 0)
    assert np.any(before)
    for name, stream in streams.items():
        if stream.shape != before.shape:  # every second pixel, and as many zero channels
            assert not np.any(stream[..., before.shape[-1] :]), name
            stream = stream[..., : before.shape[-1]]
            before = before[:, ::2, ::2]
        np.testing.assert_array_equal(stream, before, err_msg=name)
        before = streams[name]
    variables["params"]["stage1_block2"]["conv2"]["kernel"] += 0.1
    changed = signals(net, variables, x)
    assert np.any(changed["stage1_block2"] != changed["stage1_block1"])


def block_of(project):
    net = model_of("fixup_resnet50" if project else "fixup_resnet20")
    layers = ((4, 1, 1), (4, 3, 2), (16, 1, 1)) if project else ((16, 3, 2), (16, 3, 1))
    return FixupBlock(layers, 7, project, net.norm, net.conv, relu, "float32")


def test_a_block_is_the_papers_formula():
    """With scalars that are all different, by `lax` alone."""
    block = block_of(project=True)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    params = initial(block, x)["params"]
    keys = iter(jax.random.split(jax.random.key(2), 20))
    p = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape) * 0.3, params)

    def conv(x, name, strides, pad):
        dims = ("NHWC", "HWIO", "NHWC")
        kernel = p[name]["kernel"]
        return jax.lax.conv_general_dilated(
            x, kernel, (strides, strides), ((pad, pad), (pad, pad)), dimension_numbers=dims
        )

    y = nn.relu(conv(x + p["bias1a"], "conv1", 1, 0) + p["bias1b"])
    y = nn.relu(conv(y + p["bias2a"], "conv2", 2, 1) + p["bias2b"])
    y = conv(y + p["bias3a"], "conv3", 1, 0) * p["multiplier"] + p["bias3b"]
    expected = nn.relu(y + conv(x + p["bias1a"], "conv_shortcut", 2, 0))
    found = block.apply({"params": p}, x, train=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 3, 3, 16)


@pytest.mark.parametrize("project", [False, True])
def test_the_scalars_are_those_of_the_paper_and_start_at_0_and_1(project):
    x = jnp.zeros((2, 6, 6, 8))
    params = block_of(project).init(jax.random.key(0), x, train=False)["params"]
    scalars = {name: float(value) for name, value in params.items() if not isinstance(value, dict)}
    last = 3 if project else 2
    biases = {f"bias{i}{side}" for i in range(1, last + 1) for side in "ab"}
    assert scalars == dict.fromkeys(biases, 0.0) | {"multiplier": 1.0}


@pytest.mark.parametrize("model", ["fixup_resnet20", "fixup_resnet50"])
def test_logits_start_at_zero_and_the_first_gradient_is_the_classifiers(model):
    net = model_of(model, stage_sizes=(1, 1), width=8)
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    params = initial(net, x)["params"]
    assert not np.any(net.apply({"params": params}, x, train=True))

    def loss(params):
        return -jax.nn.log_softmax(net.apply({"params": params}, x, train=True))[:, 0].mean()

    gradients = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    moved = {name for name, gradient in gradients.items() if np.any(gradient)}
    assert moved == {"head/kernel", "head/bias"}  # the others' pass through its weights, 0


@pytest.mark.parametrize(
    ("model", "exponent"),
    [("fixup_resnet20", -1 / 2), ("fixup_resnet50", -1 / 4)],  # −1/(2m − 2): m = 2 and m = 3
)
@pytest.mark.parametrize("each", [1, 4])
def test_branches_start_smaller_the_more_blocks_there_are(model, exponent, each):
    stages = (each,) * (3 if model == "fixup_resnet20" else 4)
    net = model_of(model, stage_sizes=stages, width=16)
    ratios = {"scaled": [], "plain": []}  # of mean square to He's 2 / fan-in
    start = jax.jit(lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), train=False))
    for seed in range(3):
        for path, kernel in flatten_dict(start(jax.random.key(seed))["params"], sep="/").items():
            if not path.endswith("kernel") or not np.any(kernel):
                continue
            scaled = "/conv1/" in path or "/conv2/" in path
            fan_in = np.prod(kernel.shape[:-1])
            ratios["scaled" if scaled else "plain"].append(
                (float(np.mean(np.square(kernel)) * fan_in / 2), kernel.size)
            )
    num_blocks = sum(stages)
    for name, expected in (("scaled", num_blocks ** (2 * exponent)), ("plain", 1.0)):
        values, weights = zip(*ratios[name], strict=True)
        # N normal numbers have a mean square within √(2/N), five deviations of it here.
        tolerance = 5 * np.sqrt(2 / sum(weights))
        assert np.average(values, weights=weights) == pytest.approx(expected, rel=tolerance)
        assert tolerance < 0.2


def test_the_branch_shown_ends_before_multiplier_and_last_bias():
    net = model_of(stage_sizes=(1,), width=4)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = initial(net, x)
    kernel = jax.random.normal(jax.random.key(2), (3, 3, 4, 4))

    def branch(multiplier, bias):
        params = dict(variables["params"])
        scalars = {"multiplier": jnp.array(multiplier), "bias2b": jnp.array(bias)}
        params["stage1_block1"] = params["stage1_block1"] | scalars | {"conv2": {"kernel": kernel}}
        _, seen = net.apply({"params": params}, x, train=True, mutable=[SIGNALS])
        [end] = seen[SIGNALS]["stage1_block1"]["branch"]
        return np.asarray(end)

    assert np.std(branch(1.0, 0.0)) > 0.1
    np.testing.assert_array_equal(branch(3.0, 0.5), branch(1.0, 0.0))


def test_the_last_convolution_of_each_branch_and_the_head_start_at_zero():
    for model, last in (("fixup_resnet20", "conv2"), ("fixup_resnet50", "conv3")):
        net = model_of(model, stage_sizes=(1, 1), width=8)
        params = initial(net, jnp.zeros((1, 8, 8, 3)))["params"]
        for name, part in params.items():
            if "block" in name:
                assert not np.any(part[last]["kernel"])
                assert np.any(part["conv1"]["kernel"])
        assert not np.any(params["head"]["kernel"])


@pytest.mark.slow
def test_a_fixup_net_learns_digits_without_a_normalizer(tmp_path):
    import normlab

    fields = {"model.stage_sizes": (1, 1, 1), "model.width": 8, "train.num_epochs": 5}
    config = load_config("configs/digits.py:model=fixup_resnet20", fields)
    assert normlab.train(config, tmp_path)["test_accuracy"] > 0.8

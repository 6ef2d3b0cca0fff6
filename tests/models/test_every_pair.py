"""Every model with every normalizer, and every kind of layer with several: shapes, by tracing."""

import jax
import jax.numpy as jnp
import pytest

from normlab.config import load_config
from normlab.models import CONVS, MODELS, build
from normlab.norms import NORMS

SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
SHORTER = {
    "vit_tiny": {"model.depth": 2},
    "deep_mlp": {"model.depth": 2},
    "resnet20": {"model.stage_sizes": (1, 2)},
    "preact_resnet20": {"model.stage_sizes": (1, 2)},
    "nf_resnet20": {"model.stage_sizes": (1, 2)},
    "nf_resnet26": {"model.stage_sizes": (1, 2)},
    "nfnet_f0": {"model.stage_sizes": (1, 2), "model.widths": (256, 512)},
    "nf_regnet_b0": {"model.stage_sizes": (1, 2), "model.widths": (36, 78)},
    "wide_resnet": {"model.depth": 10},
    "skipinit_resnet": {"model.depth": 10},
    "fixup_resnet20": {"model.stage_sizes": (1, 2)},
    "fixup_resnet50": {"model.stage_sizes": (1, 2)},
}
"""All blocks are alike, so a few are enough."""
LARGE = ("resnet18_cifar", "resnet18", "resnet50", "vgg11", *tuple(SHORTER)[3:])
DEEPER = ("resnet32", "resnet44", "resnet56", "resnet110", "resnet34", "resnet101", "resnet152")
"""The same blocks as another model has, more of them."""
DEEPEST = tuple(
    name
    for name in MODELS
    if name.startswith(("preact_", "nf_", "nfnet_", "fixup_", "vgg")) and name not in LARGE
)
"""Likewise, of models that a test of their parameters traces anyway."""
FEW = ("none", "batch_norm", "group_norm", "evonorm_b0", "online_norm")
SMALL = tuple(name for name in MODELS if name not in LARGE + DEEPER + DEEPEST)


def pair(model, other, fast):
    """Tracing a large model takes a second, a deep one several: those are slow tests."""
    return pytest.param(model, other, marks=[] if fast else [pytest.mark.slow])


PAIRS = [
    pair(model, norm, norm in {LARGE: ("none", "batch_norm"), DEEPER: ()}.get(kind, NORMS))
    for kind in (SMALL, LARGE, DEEPER)
    for model in kind
    for norm in NORMS
] + [pair(model, norm, False) for model in DEEPEST for norm in ("none", "batch_norm")]
WEIGHTED = [
    pair(model, conv, model in ("mlp", "cnn"))
    for model in MODELS
    for conv in CONVS
    if conv != "standard" and model not in DEEPER + DEEPEST
]


def assert_traces(model, norm, conv="standard"):
    """A training step forward, with half of the batch masked, and evaluation."""
    data = "mnist" if model == "lenet5" else "cifar10"
    source = f"configs/{data}.py:model={model},norm={norm},conv={conv}"
    net = build(load_config(source, SHORTER.get(model, {})))
    images, mask = jnp.zeros((2, *SHAPES[data])), jnp.array([True, False])

    def run(key, images):
        variables = net.init(key, images, train=False)
        logits, after = net.apply(variables, images, train=True, mask=mask, mutable=["batch_stats"])
        evaluated = net.apply({**variables, **after}, images, train=False)
        return variables, after, logits, evaluated

    variables, after, logits, evaluated = jax.eval_shape(run, jax.random.key(0), images)
    for found in (logits, evaluated):
        assert found.shape == (2, 10)
        assert found.dtype == jnp.float32
    assert after.get("batch_stats", {}) == variables.get("batch_stats", {})


@pytest.mark.parametrize(("model", "norm"), PAIRS)
def test_model_and_normalizer(model, norm):
    assert_traces(model, norm)


@pytest.mark.parametrize(("model", "conv"), WEIGHTED)
@pytest.mark.parametrize("norm", FEW)
def test_model_and_kind_of_layer(model, norm, conv):
    assert_traces(model, norm, conv)

"""The first number of parameters in each model's docstring is that of the model."""

import re

import jax
import jax.numpy as jnp
import pytest

from normlab.config import load_config
from normlab.models import MODELS, build, count_params

COUNTS = {
    name: re.search(r"([\d,]+) parameters([^.;]*)", " ".join((cls.__doc__ or "").split()))
    for name, cls in MODELS.items()
}
"""{model: (count, under which conditions)}, None where the docstring has none."""
WITHOUT = ("mlp", "deep_mlp", "cnn", "lenet5", "rnn")
"""Models whose size is the user's, or which their module's docstring counts."""
DEEP = re.compile(r".*(56|1\d\d|200|288|_f[1-7]|_b[1-5])")


def source_of(name, conditions):
    """Returns the config with the classes and the normalizer that the docstring says.

    CIFAR-10's ten classes unless it says 1,000, and the model's own normalizer if it names none.
    """
    data = "imagenet" if "1,000 classes" in conditions else "cifar10"
    conditions = conditions.partition(",")[0]
    norm = next((f",norm={n}" for w, n in NORMS.items() if w in conditions), "")
    return f"configs/{data}.py:model={name}{norm}"


NORMS = {"with batch norm": "batch_norm", "without norm": "none"}


def test_all_other_docstrings_have_a_count():
    assert {name for name, found in COUNTS.items() if found is None} == set(WITHOUT)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if DEEP.fullmatch(name) else [])
        for name, found in COUNTS.items()
        if found
    ],
)
def test_a_model_has_the_parameters_of_its_docstring(name):
    count, conditions = COUNTS[name].groups()
    net = build(load_config(source_of(name, conditions)))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)  # no count depends on the side
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images)
    assert count_params(shapes["params"]) == int(count.replace(",", ""))

"""The probe: percentiles of one unit's input to its activation, and binary images."""

import jax
import numpy as np
import pytest

from normlab.config import load_config
from normlab.data import binarized, load
from normlab.errors import UserError
from normlab.training import parallel
from normlab.training.examples import load_data
from normlab.training.probe import unit_percentiles
from normlab.training.setup import build_parts
from normlab.training.state import create_state

FIELDS = {"train.num_steps": 4, "model.widths": (8, 6), "probe.layer": "norm2", "probe.unit": 3}


def parts_of(norm="batch_norm", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return build_parts(load_config(f"configs/digits.py:model=mlp,norm={norm}", FIELDS | names))


@pytest.mark.parametrize("norm", ["none", "batch_norm"])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_percentiles_are_those_of_the_units_input_over_the_whole_test_set(norm, batch_size):
    """By numpy: two layers of weights; batch_norm as it starts divides by √(1 + 1e-5)."""
    parts = parts_of(norm, eval__batch_size=batch_size)
    compiler = parallel.Compiler()
    variables = create_state(parts, compiler).variables()
    data = load_data(parts.config, parallel.make_mesh())
    test = data.evaluated["test"]
    got = unit_percentiles(parts.config, parts.model, parts.info, compiler, variables, test)

    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    x = (np.asarray(test.examples[0], np.float64) / 255 - parts.info.mean[0]) / parts.info.std[0]
    x = x.reshape(len(x), -1)
    divisor = np.sqrt(1 + 1e-5) if norm == "batch_norm" else 1.0
    hidden = 1 / (1 + np.exp(-(x @ params["dense1"]["kernel"]) / divisor))
    unit = (hidden @ params["dense2"]["kernel"] / divisor)[:, 3]
    assert list(got) == ["p15", "p50", "p85"]
    np.testing.assert_allclose(list(got.values()), np.percentile(unit, (15, 50, 85)), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("probe.layer", "norm3", "unknown 'probe.layer' 'norm3'; did you mean 'norm2'"),
        ("probe.unit", 6, "'probe.unit' = 6 must be from 0 to 5"),
        ("probe.percentiles", (15.0, 101.0), "'probe.percentiles' has 101.0"),
    ],
)
def test_a_probe_of_nothing_is_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        parts_of(**{field.replace(".", "__"): value})


def test_binary_images_are_read_as_zeros_and_ones():
    parts = parts_of(data__binarize=True)
    images, _ = load_data(parts.config, parallel.make_mesh()).evaluated["test"].examples
    assert set(np.unique(images)) == {0, 255}
    assert (parts.info.mean, parts.info.std) == ((0.0,), (1.0,))
    # 127/255 is below one half and 128/255 above.
    data = load(parts.config.data).test
    np.testing.assert_array_equal(binarized(data).images == 255, data.images >= 128)

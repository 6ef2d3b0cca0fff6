"""A finished run, for the tests that look at what it left."""

import pytest
from small_run import small

from normlab.training.loop import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "bn"
    result = train(small(), folder, overrides={"train.num_steps": 12})
    return folder, result

"""Comparison with other frameworks; they take seconds to import, so only where it is asked for."""

import os

os.environ["KERAS_BACKEND"] = "jax"


def pytest_ignore_collect(collection_path, config):
    """`-m 'not parity'` does not even read the files, whose first lines import the frameworks."""
    return True if "not parity" in config.getoption("markexpr") else None

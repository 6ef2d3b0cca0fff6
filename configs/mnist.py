"""MNIST (60,000 + 10,000 images of 28×28), from the official files on disk (`config.data.path`)."""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    """The classic LeNet-5, with a normalizer after each hidden layer."""
    config = base.get_config(argument, model="lenet5")
    config.data.name = "mnist"
    config.data.source = "archive"
    return config

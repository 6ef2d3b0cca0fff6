"""CIFAR-100 (50,000 + 10,000 images of 32×32, 100 classes), from the official archive on disk."""

from ml_collections import ConfigDict

from configs import cifar10


def get_config(argument: str = "") -> ConfigDict:
    """The recipe of `configs/cifar10.py`."""
    config = cifar10.get_config(argument)
    config.data.name = "cifar100"
    return config

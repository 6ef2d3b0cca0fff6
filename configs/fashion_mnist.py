"""Fashion-MNIST (60,000 + 10,000 images of 28×28), from the official files on disk."""

from ml_collections import ConfigDict

from configs import mnist


def get_config(argument: str = "") -> ConfigDict:
    """As MNIST, with the batch of 256 of the LeNet-BN recipe (Dive into Deep Learning)."""
    config = mnist.get_config(argument)
    config.data.name = "fashion_mnist"
    config.train.batch_size = 256
    return config

"""Imagenette (ten classes of ImageNet), from its folders: imagenette2/{train,val}/CLASS/*.JPEG."""

from ml_collections import ConfigDict

from configs import imagenet
from normlab.config import add_duration


def get_config(argument: str = "") -> ConfigDict:
    """The recipe of `configs/imagenet.py` at 128 pixels, batch 64 and 20 epochs."""
    config = imagenet.get_config(argument)
    config.data.name = "imagenette"
    config.data.image_size = 128
    config.train.batch_size = 64
    add_duration(config, "train.num", ("steps", "epochs", "examples"), epochs=20.0)
    return config

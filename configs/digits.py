"""Scikit-learn's digits (1,797 images of 8×8): the embedded default, real and without network."""

from ml_collections import ConfigDict

from configs import base
from normlab.config import add_duration


def get_config(argument: str = "") -> ConfigDict:
    """A five-convolution net, batch 64, 15 epochs: a few seconds on one core."""
    config = base.get_config(argument)
    config.train.batch_size = 64
    if config.norm.kind == "group_norm":
        config.norm.num_groups = 8  # the net has 16 to 32 channels
    add_duration(config, "train.num", ("steps", "epochs", "examples"), epochs=15.0)
    add_duration(config, "checkpoint.every", fraction=0.5)
    return config

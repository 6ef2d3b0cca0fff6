"""CIFAR-10 (50,000 + 10,000 images of 32×32), from the official archive on disk."""

from ml_collections import ConfigDict

from configs import base
from normlab.config import add_duration


def get_config(argument: str = "") -> ConfigDict:
    """ResNet-20 by the recipe of He et al. 2016 (arXiv:1512.03385, section 4.2).

    Batch 128, SGD with momentum 0.9, learning rate 0.1 divided by 10 at 32k and 48k of 64k steps
    (164 epochs), weight decay 1e-4 on every parameter, four-pixel pad-and-crop and mirroring. The
    milestones are fractions, so that a shorter run keeps the schedule's shape.
    """
    config = base.get_config(argument, model="resnet20")
    config.data.name = "cifar10"
    config.data.source = "archive"
    config.data.crop_padding = 4
    config.data.flip = True
    add_duration(config, "train.num", ("steps", "epochs", "examples"), epochs=164.0)
    config.optim.schedule = "piecewise"
    config.optim.weight_decay = 1e-4
    config.optim.decay_roles = ("kernel", "bias", "norm_scale", "norm_bias", "norm_extra")
    return config

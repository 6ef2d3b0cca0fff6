"""ImageNet (1,281,167 + 50,000 images, 1000 classes), from class folders or a TFDS directory."""

from ml_collections import ConfigDict

from configs import base
from normlab.config import add_duration


def get_config(argument: str = "") -> ConfigDict:
    """ResNet-50 in 90 epochs, as Goyal et al. 2017 (arXiv:1706.02677, section 5.1) train it.

    Batch 256, SGD with Nesterov momentum 0.9, learning rate 0.1 · batch/256 after a warmup of 5
    epochs, divided by 10 at epochs 30, 60 and 80, weight decay 1e-4 but not on the normalizers'
    parameters, γ = 0 in the last BN of a block, random resized crops of 224 pixels and mirroring,
    evaluation on the middle 224 of 256 pixels. Their colour augmentation is not there. Durations
    are fractions, so that a shorter run keeps the schedule's shape.
    """
    config = base.get_config(argument, model="resnet50")
    config.data.name = "imagenet"
    config.data.source = "folder"
    config.data.image_size = 224
    config.data.random_resized_crop = True
    config.data.flip = True
    config.train.batch_size = 256
    add_duration(config, "train.num", ("steps", "epochs", "examples"), epochs=90.0)
    add_duration(config, "optim.warmup", fraction=5 / 90)
    add_duration(config, "optim.milestones", fraction=(30 / 90, 60 / 90, 80 / 90))
    config.optim.schedule = "piecewise"
    config.optim.reference_batch_size = 256
    config.optim.weight_decay = 1e-4
    if config.optim.kind == "sgd":
        config.optim.nesterov = True
    config.eval.batch_size = 256
    return config

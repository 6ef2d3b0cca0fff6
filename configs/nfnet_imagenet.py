"""ImageNet without normalizers: NFNets by the recipe of Brock et al. 2021 (arXiv:2102.06171)."""

from ml_collections import ConfigDict

from configs import base
from normlab.config import add_duration

VARIANTS = {
    "nfnet_f0": (192, 256, 5),
    "nfnet_f1": (224, 320, 10),
    "nfnet_f2": (256, 352, 10),
    "nfnet_f3": (320, 416, 15),
    "nfnet_f4": (384, 512, 15),
    "nfnet_f5": (416, 544, 15),
    "nfnet_f6": (448, 576, 15),
    "nfnet_f7": (480, 608, 15),
}
"""Side of the images in training and in evaluation, pixels, and the magnitude of RandAugment."""

OTHERS = (224, 224, 10)
"""The same for any other model."""

STEPS = 360 * 1_281_167 // 4096
"""360 epochs, of which no remainder is dropped: 112,602 steps."""


def get_config(argument: str = "") -> ConfigDict:
    """NFNet-F0 in 360 epochs of batch 4096; F1 to F7 by `model=nfnet_f1` and so on.

    SGD with Nesterov momentum 0.9; learning rate 0.1 · batch/256 after a warmup of 5 epochs, then a
    cosine to zero; adaptive gradient clipping by 0.01, the classifier's weight left alone; weight
    decay 2e-5 on kernels; label smoothing 0.1; evaluation of a moving average of the weights;
    activations in bfloat16; MixUp on half of each batch, CutMix on the other, then RandAugment.
    Dropout and stochastic depth are fields of the model. docs/recipes.md says what differs from the
    paper. The warmup is a fraction, so that a shorter run keeps the schedule's shape.
    """
    config = base.get_config(argument, model="nfnet_f0")
    size, eval_size, magnitude = VARIANTS.get(config.model.kind, OTHERS)
    config.data.name = "imagenet"
    config.data.source = "folder"
    config.data.image_size = size
    config.data.eval_image_size = eval_size
    config.data.eval_crop = eval_size / (eval_size + 32)  # resized to 32 more, then cropped
    config.data.interpolation = "bicubic"
    config.data.random_resized_crop = True
    config.data.flip = True
    config.data.mixup_alpha = 0.2
    config.data.mixup_share = 0.5
    config.data.cutmix_alpha = 1.0
    config.data.cutmix_share = 0.5
    config.data.randaugment_layers = 4
    config.data.randaugment_magnitude = magnitude
    if "dtype" in config.model:
        config.model.dtype = "bfloat16"

    config.train.batch_size = 4096
    add_duration(config, "train.num", ("steps", "epochs", "examples"), examples=STEPS * 4096)
    config.train.label_smoothing = 0.1
    config.train.ema_decay = 0.99999
    config.train.ema_warmup = True
    add_duration(config, "optim.warmup", fraction=5 / 360)
    config.optim.schedule = "cosine"
    config.optim.base_lr = 0.1
    config.optim.reference_batch_size = 256
    config.optim.weight_decay = 2e-5
    config.optim.agc_clipping = 0.01
    if config.optim.kind == "sgd":
        config.optim.nesterov = True
    config.eval.batch_size = 256
    return config

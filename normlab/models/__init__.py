"""Models: flax.linen modules, channels last, called as `model(x, train=..., mask=None)`.

Normalizer, convolution and activation are injected; a model never asks which it got. Every layer
has a name that does not depend on the normalizer, so variants that share a seed share the initial
values of the parameters they have in common.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from normlab.data import describe
from normlab.errors import UserError, unknown
from normlab.models.activations import ACTIVATIONS
from normlab.models.cnn import CNN
from normlab.models.conv import StandardConv
from normlab.models.deep_mlp import DeepMLP
from normlab.models.fixup import (
    FixupResNet20,
    FixupResNet32,
    FixupResNet50,
    FixupResNet56,
    FixupResNet101,
    FixupResNet110,
)
from normlab.models.lenet import LeNet5
from normlab.models.mlp import MLP
from normlab.models.nf_regnet import (
    NFRegNetB0,
    NFRegNetB1,
    NFRegNetB2,
    NFRegNetB3,
    NFRegNetB4,
    NFRegNetB5,
)
from normlab.models.nf_resnet import (
    NFResNet20,
    NFResNet26,
    NFResNet32,
    NFResNet50,
    NFResNet56,
    NFResNet101,
    NFResNet152,
    NFResNet200,
    NFResNet288,
    PreActResNet20,
    PreActResNet32,
    PreActResNet50,
    PreActResNet56,
)
from normlab.models.nfnet import (
    NFNetF0,
    NFNetF1,
    NFNetF2,
    NFNetF3,
    NFNetF4,
    NFNetF5,
    NFNetF6,
    NFNetF7,
)
from normlab.models.placement import parse_overrides
from normlab.models.resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152
from normlab.models.resnet_cifar import (
    ResNet18Cifar,
    ResNet20,
    ResNet32,
    ResNet44,
    ResNet56,
    ResNet110,
)
from normlab.models.rnn import RNN
from normlab.models.vgg import VGG11, VGG13, VGG16, VGG19
from normlab.models.vit import ViTTiny
from normlab.models.weight_space import (
    ScaledWeightStandardization,
    WeightCentering,
    WeightNorm,
    WeightStandardization,
)
from normlab.models.wide_resnet import SkipInitResNet, WideResNet
from normlab.norms import make_norm
from normlab.run_length import RunLength

MODELS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "deep_mlp": DeepMLP,
    "cnn": CNN,
    "lenet5": LeNet5,
    "resnet20": ResNet20,
    "resnet32": ResNet32,
    "resnet44": ResNet44,
    "resnet56": ResNet56,
    "resnet110": ResNet110,
    "resnet18_cifar": ResNet18Cifar,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "resnet152": ResNet152,
    "preact_resnet20": PreActResNet20,
    "preact_resnet32": PreActResNet32,
    "preact_resnet56": PreActResNet56,
    "preact_resnet50": PreActResNet50,
    "nf_resnet20": NFResNet20,
    "nf_resnet32": NFResNet32,
    "nf_resnet56": NFResNet56,
    "nf_resnet26": NFResNet26,
    "nf_resnet50": NFResNet50,
    "nf_resnet101": NFResNet101,
    "nf_resnet152": NFResNet152,
    "nf_resnet200": NFResNet200,
    "nf_resnet288": NFResNet288,
    "nfnet_f0": NFNetF0,
    "nfnet_f1": NFNetF1,
    "nfnet_f2": NFNetF2,
    "nfnet_f3": NFNetF3,
    "nfnet_f4": NFNetF4,
    "nfnet_f5": NFNetF5,
    "nfnet_f6": NFNetF6,
    "nfnet_f7": NFNetF7,
    "nf_regnet_b0": NFRegNetB0,
    "nf_regnet_b1": NFRegNetB1,
    "nf_regnet_b2": NFRegNetB2,
    "nf_regnet_b3": NFRegNetB3,
    "nf_regnet_b4": NFRegNetB4,
    "nf_regnet_b5": NFRegNetB5,
    "wide_resnet": WideResNet,
    "skipinit_resnet": SkipInitResNet,
    "fixup_resnet20": FixupResNet20,
    "fixup_resnet32": FixupResNet32,
    "fixup_resnet56": FixupResNet56,
    "fixup_resnet110": FixupResNet110,
    "fixup_resnet50": FixupResNet50,
    "fixup_resnet101": FixupResNet101,
    "vgg11": VGG11,
    "vgg13": VGG13,
    "vgg16": VGG16,
    "vgg19": VGG19,
    "rnn": RNN,
    "vit_tiny": ViTTiny,
}
"""Models by config name."""

CONVS: dict[str, type[StandardConv]] = {
    "standard": StandardConv,
    "weight_norm": WeightNorm,
    "weight_centering": WeightCentering,
    "weight_standardization": WeightStandardization,
    "scaled_weight_standardization": ScaledWeightStandardization,
}
"""Kinds of convolution and dense layer by config name."""

INJECTED = ("num_classes", "norm", "conv", "remat")
"""Fields of models that `build` fills in; they are never part of `config.model`."""


def build(
    config: ConfigDict,
    run_length: RunLength | None = None,
    *,
    num_devices: int = 1,
    axis_name: str | None = None,
) -> nn.Module:
    """Returns the model that the config describes, for the classes of its data set.

    Raises UserError or ValueError, one line, for a name that does not exist or a scope that does
    not fit the batch.
    """
    fields = dict(config.model)
    kind = fields.pop("kind")
    if kind not in MODELS:
        raise unknown("model", kind, MODELS)
    if fields["activation"] not in ACTIVATIONS:
        raise unknown("'model.activation'", fields["activation"], ACTIVATIONS)
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    length = run_length or RunLength.of(config)
    overrides = parse_overrides(config.norm_overrides)
    conv = dict(config.conv)
    if config.train.remat:
        if not hasattr(MODELS[kind], "remat"):
            raise UserError(
                f"config field 'train.remat' = true: model {kind!r} has no residual blocks"
            )
        fields["remat"] = True
    return MODELS[kind](
        num_classes=describe(config.data).num_classes,
        norm=make_norm(
            config,
            length,
            overrides=overrides,
            defaults=norm_defaults(kind),
            num_devices=num_devices,
            axis_name=axis_name,
        ),
        conv=CONVS[conv.pop("kind")](**conv),
        **fields,
    )


def norm_defaults(kind: str) -> Mapping[str, Any]:
    """Returns the fields of normalizers that have another default in a model of this kind."""
    return getattr(MODELS[kind], "norm_defaults", {})


def default_choices(kind: str) -> dict[str, str]:
    """Returns what a model of this kind goes with unless the user chooses: norm, conv.

    A normalizer-free net has no normalizer and convolutions of its own.
    """
    return dict(getattr(MODELS.get(kind), "default_choices", {}))


def count_params(params: Any) -> int:
    """Returns the number of trainable numbers in a tree of parameters (or of their shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

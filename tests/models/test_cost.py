"""Multiply-accumulates, counted by hand."""

import pytest

from normlab.config import load_config
from normlab.models import build
from normlab.models.cost import macs, xla_flops


def model_of(source):
    config = load_config(source)
    return build(config)


def test_resnet20_by_hand():
    # 3×3 convolutions, pixels · 9 · in · out: the first 1024·27·16 = 442,368; six at 16 channels,
    # 1024·144·16 = 2,359,296 each; then twice one of half of that (the stride) and five whole ones;
    # the head 64·10. Shortcuts of option A cost nothing.
    whole = 2_359_296
    expected = 442_368 + 6 * whole + 2 * (whole // 2 + 5 * whole) + 640
    assert expected == 40_551_040
    assert macs(model_of("configs/cifar10.py"), (32, 32, 3)) == expected


def test_an_mlp_by_hand():
    # 64·100 + 100·100 + 100·100 + 100·10.
    assert macs(model_of("configs/digits.py:model=mlp"), (8, 8, 1)) == 27_400


def test_resnet50_has_4_billion():
    # 4.09·10⁹ for version 1.5 (stride in the 3×3), 3.86·10⁹ for version 1: torchvision's and
    # timm's tables round to 4.09 and 4.1.
    count = macs(model_of("configs/digits.py:model=resnet50"), (224, 224, 3))
    assert count == pytest.approx(4.09e9, rel=0.003)


def test_nf_resnet50_has_those_of_resnet50():
    # The same convolutions in another order. torchvision's table has 4.089·10⁹ for ResNet-50.
    nf, bn = (
        macs(model_of(f"configs/imagenet.py:model={model}"), (224, 224, 3))
        for model in ("nf_resnet50", "resnet50")
    )
    assert nf == bn
    assert nf / 1e9 == pytest.approx(4.089, abs=0.0005)


def test_wrn_28_10_by_hand():
    # The stem as ResNet-20's. A 3×3 convolution of a stage's width costs the same in all three,
    # pixels · 9 · width²: seven each. Their first ones come from fewer channels, in the second and
    # third with stride 2, and beside them stands a 1×1 shortcut. Zagoruyko & Komodakis 2016
    # (arXiv:1605.07146) give 5.2·10⁹ multiplications.
    whole = 1024 * 9 * 160**2
    assert whole == 256 * 9 * 320**2 == 64 * 9 * 640**2
    firsts = 1024 * 16 * 160 * (9 + 1) + (256 * 160 * 320 + 64 * 320 * 640) * (9 + 1)
    expected = 442_368 + 21 * whole + firsts + 640 * 10
    count = macs(model_of("configs/cifar10.py:model=wide_resnet"), (32, 32, 3))
    assert count == expected == 5_243_328_768


def test_vgg16_by_hand():
    # 3×3 convolutions, pixels · 9 · in · out, and three dense layers.
    pixels = [side**2 for side in (224, 112, 56, 28, 14)]
    pairs = [
        [(3, 64), (64, 64)],
        [(64, 128), (128, 128)],
        [(128, 256), (256, 256), (256, 256)],
        [(256, 512), (512, 512), (512, 512)],
        [(512, 512), (512, 512), (512, 512)],
    ]
    convs = sum(p * 9 * sum(a * b for a, b in g) for p, g in zip(pixels, pairs, strict=True))
    dense = 49 * 512 * 4096 + 4096**2 + 4096 * 1000
    config = load_config("configs/imagenet.py:model=vgg16,norm=none", {"model.hidden_width": 4096})
    # torchvision's table: 15.47·10⁹.
    assert macs(build(config), (224, 224, 3)) == convs + dense == 15_470_264_320


@pytest.mark.parametrize(
    "norm", ["none", "layer_norm", "group_norm", "batch_norm", "iterative_norm"]
)
def test_normalizers_cost_no_multiply_accumulate(norm):
    model = model_of(f"configs/digits.py:model=mlp,norm={norm}")
    assert macs(model, (8, 8, 1)) == 27_400


def test_xla_counts_multiplications_and_additions():
    model = model_of("configs/digits.py:model=mlp,norm=none")
    assert 2 * 27_400 <= xla_flops(model, (8, 8, 1)) < 2.2 * 27_400

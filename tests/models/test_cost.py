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


@pytest.mark.parametrize(
    "norm", ["none", "layer_norm", "group_norm", "batch_norm", "iterative_norm"]
)
def test_normalizers_cost_no_multiply_accumulate(norm):
    model = model_of(f"configs/digits.py:model=mlp,norm={norm}")
    assert macs(model, (8, 8, 1)) == 27_400


def test_xla_counts_multiplications_and_additions():
    model = model_of("configs/digits.py:model=mlp,norm=none")
    assert 2 * 27_400 <= xla_flops(model, (8, 8, 1)) < 2.2 * 27_400

"""Normalizers: flax.linen modules, channels last, called as `norm(x, train=..., mask=None)`.

Imports nothing else of normlab. Start with `batch.py` for the science, `functional.py` for the
arithmetic, and `groups.py` for which examples share a statistic.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from normlab.norms.backward import join_state, split_state
from normlab.norms.batch import BatchNorm
from normlab.norms.batch_group import BatchGroupNorm
from normlab.norms.batch_layer import BatchLayerNorm
from normlab.norms.cross_iteration_batch import CrossIterationBatchNorm
from normlab.norms.decorrelated import DecorrelatedBatchNorm
from normlab.norms.derf import Derf
from normlab.norms.dyt import DynamicTanh
from normlab.norms.evonorm_b0 import EvoNormB0
from normlab.norms.evonorm_s0 import EvoNormS0
from normlab.norms.factory import FACTORY_FIELDS, NormAct, NormFactory, make_factory
from normlab.norms.filter_response import FilterResponseNorm
from normlab.norms.full import FullNorm
from normlab.norms.functional import Moments
from normlab.norms.group import GroupNorm
from normlab.norms.identity import Identity
from normlab.norms.instance import InstanceNorm
from normlab.norms.iterative import IterativeNorm
from normlab.norms.l1_batch import L1BatchNorm
from normlab.norms.layer import LayerNorm
from normlab.norms.mean_only import MeanOnlyBatchNorm
from normlab.norms.moving_average_batch import MovingAverageBatchNorm
from normlab.norms.normalizer import LayerBefore, Normalizer
from normlab.norms.online import OnlineNorm
from normlab.norms.power import PowerNorm
from normlab.norms.proxy import ProxyNorm
from normlab.norms.renorm import BatchRenorm
from normlab.norms.rms import RMSNorm
from normlab.norms.switchable import SwitchableNorm

NORMS: dict[str, type[Normalizer]] = {
    "none": Identity,
    "batch_norm": BatchNorm,
    "batch_renorm": BatchRenorm,
    "l1_batch_norm": L1BatchNorm,
    "mean_only_batch_norm": MeanOnlyBatchNorm,
    "batch_group_norm": BatchGroupNorm,
    "batch_layer_norm": BatchLayerNorm,
    "cross_iteration_batch_norm": CrossIterationBatchNorm,
    "full_norm": FullNorm,
    "moving_average_batch_norm": MovingAverageBatchNorm,
    "online_norm": OnlineNorm,
    "power_norm": PowerNorm,
    "layer_norm": LayerNorm,
    "rms_norm": RMSNorm,
    "group_norm": GroupNorm,
    "instance_norm": InstanceNorm,
    "switchable_norm": SwitchableNorm,
    "filter_response_norm": FilterResponseNorm,
    "evonorm_b0": EvoNormB0,
    "evonorm_s0": EvoNormS0,
    "proxy_norm": ProxyNorm,
    "decorrelated_batch_norm": DecorrelatedBatchNorm,
    "iterative_norm": IterativeNorm,
    "dyt": DynamicTanh,
    "derf": Derf,
}
"""Normalizers by config name."""


def make_norm(
    config: Any,
    run_length: Any,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    num_devices: int = 1,
    axis_name: str | None = None,
) -> NormFactory:
    """Returns the factory of the normalizer that `config.norm.kind` names (see `make_factory`).

    `overrides`: (pattern of paths, kind) of the normalizers that differ; `defaults`: fields in
    which these depart from their class.
    """
    kind = config.norm.kind
    for name in (kind, *(other for _, other in overrides)):
        if name not in NORMS:
            raise ValueError(f"unknown norm {name!r}; one of {', '.join(NORMS)}")
    return make_factory(
        NORMS[kind],
        config,
        run_length,
        overrides=[(pattern, NORMS[other]) for pattern, other in overrides],
        defaults=defaults,
        num_devices=num_devices,
        axis_name=axis_name,
    )


__all__ = [
    "FACTORY_FIELDS",
    "NORMS",
    "BatchGroupNorm",
    "BatchLayerNorm",
    "BatchNorm",
    "BatchRenorm",
    "CrossIterationBatchNorm",
    "DecorrelatedBatchNorm",
    "Derf",
    "DynamicTanh",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "FullNorm",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "IterativeNorm",
    "L1BatchNorm",
    "LayerBefore",
    "LayerNorm",
    "MeanOnlyBatchNorm",
    "Moments",
    "MovingAverageBatchNorm",
    "NormAct",
    "NormFactory",
    "Normalizer",
    "OnlineNorm",
    "PowerNorm",
    "ProxyNorm",
    "RMSNorm",
    "SwitchableNorm",
    "join_state",
    "make_norm",
    "split_state",
]

"""Normalizers: flax.linen modules, channels last, called as `norm(x, train=..., mask=None)`.

Imports nothing else of normlab. Start with `batch.py` for the science, `functional.py` for the
arithmetic, and `groups.py` for which examples share a statistic.
"""

from typing import Any

from normlab.norms.batch import BatchNorm
from normlab.norms.decorrelated import DecorrelatedBatchNorm
from normlab.norms.derf import Derf
from normlab.norms.dyt import DynamicTanh
from normlab.norms.evonorm_b0 import EvoNormB0
from normlab.norms.evonorm_s0 import EvoNormS0
from normlab.norms.factory import FACTORY_FIELDS, NormFactory, make_factory
from normlab.norms.filter_response import FilterResponseNorm
from normlab.norms.functional import Moments
from normlab.norms.group import GroupNorm
from normlab.norms.identity import Identity
from normlab.norms.instance import InstanceNorm
from normlab.norms.iterative import IterativeNorm
from normlab.norms.layer import LayerNorm
from normlab.norms.normalizer import Normalizer
from normlab.norms.proxy import ProxyNorm
from normlab.norms.renorm import BatchRenorm
from normlab.norms.rms import RMSNorm
from normlab.norms.switchable import SwitchableNorm

NORMS: dict[str, type[Normalizer]] = {
    "none": Identity,
    "batch_norm": BatchNorm,
    "batch_renorm": BatchRenorm,
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
    config: Any, run_length: Any, *, num_devices: int = 1, axis_name: str | None = None
) -> NormFactory:
    """Returns the factory of the normalizer that `config.norm.kind` names (see `make_factory`)."""
    kind = config.norm.kind
    if kind not in NORMS:
        raise ValueError(f"unknown norm {kind!r}; one of {', '.join(NORMS)}")
    return make_factory(
        NORMS[kind], config, run_length, num_devices=num_devices, axis_name=axis_name
    )


__all__ = [
    "FACTORY_FIELDS",
    "NORMS",
    "BatchNorm",
    "BatchRenorm",
    "DecorrelatedBatchNorm",
    "Derf",
    "DynamicTanh",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "IterativeNorm",
    "LayerNorm",
    "Moments",
    "NormFactory",
    "Normalizer",
    "ProxyNorm",
    "RMSNorm",
    "SwitchableNorm",
    "make_norm",
]

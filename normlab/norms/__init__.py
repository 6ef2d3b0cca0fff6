"""Normalizers: flax.linen modules, channels last, called as `norm(x, train=..., mask=None)`.

Imports nothing else of normlab. Start with `batch.py` for the science, `functional.py` for the
arithmetic, and `groups.py` for which examples share a statistic.
"""

from collections.abc import Sequence
from typing import Any

from normlab.norms.batch import BatchNorm
from normlab.norms.factory import FACTORY_FIELDS, NormFactory, make_factory
from normlab.norms.functional import Moments
from normlab.norms.group import GroupNorm
from normlab.norms.identity import Identity
from normlab.norms.instance import InstanceNorm
from normlab.norms.layer import LayerNorm
from normlab.norms.normalizer import Normalizer
from normlab.norms.renorm import BatchRenorm
from normlab.norms.rms import RMSNorm

NORMS: dict[str, type[Normalizer]] = {
    "none": Identity,
    "batch_norm": BatchNorm,
    "batch_renorm": BatchRenorm,
    "layer_norm": LayerNorm,
    "rms_norm": RMSNorm,
    "group_norm": GroupNorm,
    "instance_norm": InstanceNorm,
}
"""Normalizers by config name."""


def make_norm(
    config: Any,
    run_length: Any,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    num_devices: int = 1,
    axis_name: str | None = None,
) -> NormFactory:
    """Returns the factory of the normalizer that `config.norm.kind` names (see `make_factory`).

    `overrides`: (pattern of paths, kind) of the normalizers that differ.
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
        num_devices=num_devices,
        axis_name=axis_name,
    )


__all__ = [
    "FACTORY_FIELDS",
    "NORMS",
    "BatchNorm",
    "BatchRenorm",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "NormFactory",
    "Normalizer",
    "RMSNorm",
    "make_norm",
]

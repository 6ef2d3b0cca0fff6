"""Optimizers, schedules and the roles of parameters."""

from normlab.optim.agc import adaptive_grad_clip, clipped_fractions, units
from normlab.optim.build import OPTIMIZERS, agc_settings, build_direction, check_agc
from normlab.optim.masks import ROLES, role_mask, roles
from normlab.optim.sam import ascended
from normlab.optim.schedules import SHAPES, build_schedule, peak_learning_rate

__all__ = [
    "OPTIMIZERS",
    "ROLES",
    "SHAPES",
    "adaptive_grad_clip",
    "agc_settings",
    "ascended",
    "build_direction",
    "build_schedule",
    "check_agc",
    "clipped_fractions",
    "peak_learning_rate",
    "role_mask",
    "roles",
    "units",
]

"""Optimizers, schedules and the roles of parameters."""

from normlab.optim.build import OPTIMIZERS, build_direction
from normlab.optim.masks import ROLES, role_mask, roles
from normlab.optim.schedules import SHAPES, build_schedule, peak_learning_rate

__all__ = [
    "OPTIMIZERS",
    "ROLES",
    "SHAPES",
    "build_direction",
    "build_schedule",
    "peak_learning_rate",
    "role_mask",
    "roles",
]

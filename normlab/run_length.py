"""How long a run is, and what that makes of a duration in any unit."""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from normlab.data import describe
from normlab.errors import UserError
from normlab.norms.factory import UNITS


@dataclasses.dataclass(frozen=True)
class RunLength:
    """How long a run is, to turn any duration into steps."""

    num_steps: int  # optimizer steps of the whole run
    steps_per_epoch: int  # full batches in the training set; a last partial batch is dropped
    batch_size: int  # examples per step, over all devices

    @classmethod
    def of(cls, config: ConfigDict) -> "RunLength":
        """Returns the run's length from `train.num_*`, `train.batch_size` and the data set's size.

        Raises UserError if a batch cannot be filled or the run has no step.
        """
        batch_size = config.train.batch_size
        num_train, held_out = describe(config.data).num_train, config.data.num_validation
        if not 0 <= held_out < num_train:
            raise UserError(
                f"config field 'data.num_validation' = {held_out} must be from 0 to "
                f"{num_train - 1}, as {config.data.name} has {num_train} training examples"
            )
        num_train -= held_out
        if not 0 < batch_size <= num_train:
            raise UserError(
                f"config field 'train.batch_size' = {batch_size} must be from 1 to {num_train}, "
                f"the training examples of {config.data.name}"
            )
        steps_per_epoch = num_train // batch_size
        unknown_length = cls(0, steps_per_epoch, batch_size)
        num_steps = unknown_length.steps(config.train, "num", "train")
        if num_steps is None or num_steps < 1:
            given = [unit for unit in UNITS if config.train.get(f"num_{unit}") is not None]
            name = f"train.num_{given[0] if given else 'epochs'}"
            value = config.train.get(name.rpartition(".")[2])
            raise UserError(f"config field {name!r} = {value} makes a run of no step")
        return cls(num_steps, steps_per_epoch, batch_size)

    def steps(self, section: ConfigDict, stem: str, section_name: str = "") -> Any:
        """Returns the duration `stem` of `section` in steps (an int, or a tuple of them).

        None if no unit is set. Raises UserError if more than one is.
        """
        values = {
            unit: section[f"{stem}_{unit}"]
            for unit in UNITS
            if section.get(f"{stem}_{unit}") is not None
        }
        if not values:
            return None
        name = ".".join(filter(None, [section_name, stem]))
        if len(values) > 1:
            fields = " and ".join(f"'{name}_{unit}'" for unit in values)
            raise UserError(f"{fields} are both set; a duration takes exactly one of its units")
        [(unit, value)] = values.items()
        if isinstance(value, tuple):
            return tuple(self._in_steps(f"{name}_{unit}", unit, part) for part in value)
        return self._in_steps(f"{name}_{unit}", unit, value)

    def _in_steps(self, name: str, unit: str, value: float) -> int:
        if not 0 <= value < math.inf or (unit == "fraction" and value > 1):
            allowed = "from 0 to 1" if unit == "fraction" else "0 or more"
            raise UserError(f"config field {name!r} = {value} must be {allowed}")
        per_unit = {
            "steps": 1.0,
            "epochs": float(self.steps_per_epoch),
            "examples": 1.0 / self.batch_size,
            "fraction": float(self.num_steps),
        }
        steps = value * per_unit[unit]
        if steps >= 2**31:
            raise UserError(f"config field {name!r} = {value} is more than 2**31 - 1 steps")
        return round(steps)

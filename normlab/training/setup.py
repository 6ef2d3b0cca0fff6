"""From a config to the parts of a run. Everything that can be refused is refused here, before any
data is read and anything compiled.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from normlab import models, optim
from normlab.config import RunLength, identity, run_id
from normlab.data import DatasetInfo, check_source, dataset_info
from normlab.errors import UserError
from normlab.norms import NORMS, NormFactory
from normlab.optim.schedules import Schedule
from normlab.training import parallel


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a config describes, built but not started."""

    config: ConfigDict
    length: RunLength
    info: DatasetInfo
    model: nn.Module
    direction: optax.GradientTransformation
    schedule: Schedule

    @property
    def norm(self) -> NormFactory:
        """The factory that the model's normalizers come from."""
        return self.model.norm

    def abstract_variables(self) -> Any:
        """Returns the shapes of the model's variables, without computing anything."""
        images = jax.ShapeDtypeStruct((2, *self.info.image_shape), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(lambda k, x: self.model.init(k, x, train=False), key, images)


def build_parts(config: ConfigDict, *, need_data: bool = True) -> Parts:
    """Builds the parts of a run; raises UserError, one line, for what does not fit together.

    With `need_data`, also for a data set that is not where the config says.
    """
    length = RunLength.of(config)
    _check_numbers(config)
    parallel.check_batch(config)
    parallel.steps_per_dispatch(config)
    if need_data:
        check_source(config.data)
    try:
        model = models.build(config, length, num_devices=parallel.num_devices())
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from error
    parts = Parts(
        config=config,
        length=length,
        info=dataset_info(config.data.name),
        model=model,
        direction=optim.build_direction(config),
        schedule=optim.build_schedule(config, length),
    )
    for section, stem in (("eval", "every"), ("log", "every"), ("checkpoint", "every")):
        length.steps(config[section], stem, section)
    try:
        parts.abstract_variables()
    except (ValueError, TypeError, ZeroDivisionError) as error:
        kind, data = config.model.kind, config.data.name
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {kind!r} cannot take the images of {data!r}: {reason}") from error
    return parts


def run_identity(config: ConfigDict) -> dict[str, Any]:
    """Returns the run's identity (`config.identity`) on this machine's devices."""
    stateful = NORMS[config.norm.kind].stateful
    return identity(config, stateful=stateful, num_devices=parallel.num_devices())


def id_of(config: ConfigDict) -> str:
    """Returns the run's id: 12 hex digits."""
    return run_id(run_identity(config))


def _check_numbers(config: ConfigDict) -> None:
    limits = (
        ("eval.batch_size", 1, None),
        ("train.max_nonfinite", 1, None),
        ("train.label_smoothing", 0.0, 1.0),
        ("train.ema_decay", 0.0, 1.0),
        ("checkpoint.keep", 1, None),
        ("data.crop_padding", 0, None),
        ("data.cutout_size", 0, None),
        ("seed", 0, 2**32 - 1),
    )
    for name, low, high in limits:
        section, _, key = name.rpartition(".")
        value = (config[section] if section else config)[key]
        if value is not None and (value < low or (high is not None and value > high)):
            allowed = f"{low} or more" if high is None else f"from {low} to {high}"
            raise UserError(f"config field {name!r} = {value} must be {allowed}")

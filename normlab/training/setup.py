"""From a config to the parts of a run. Everything that can be refused is refused here, before any
data is read and anything compiled.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from ml_collections import ConfigDict

from normlab import models, optim
from normlab.config import flatten, identity, run_id, to_json
from normlab.data import (
    DatasetInfo,
    check_cropping,
    check_mixing,
    check_source,
    describe,
    evaluated,
)
from normlab.errors import UserError, unknown
from normlab.models.placement import check_overrides, parse_overrides
from normlab.norms import NORMS, NormFactory
from normlab.optim.schedules import Schedule
from normlab.run_length import RunLength
from normlab.training import parallel
from normlab.training.layout import Layout
from normlab.training.probe import check_probe


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a config describes, built but not started."""

    config: ConfigDict
    length: RunLength
    info: DatasetInfo
    model: nn.Module
    replica: nn.Module  # the model as the training step has it: under pmap that of one device
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
    _check_numbers(config)
    _check_dtypes(config)
    check_cropping(config.data)
    check_mixing(config.data)
    length = RunLength.of(config)
    layout = parallel.make_layout(config)
    parallel.steps_per_dispatch(config)
    if need_data:
        check_source(config.data)
    try:
        model = models.build(config, length, num_devices=parallel.num_devices(config))
        axis_name = parallel.axis_name(config)
        replica = models.build(config, length, axis_name=axis_name) if axis_name else model
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from error
    _check_norm(model.norm)
    _check_layout(config, layout, model.norm)
    parts = Parts(
        config=config,
        length=length,
        info=describe(config.data),
        model=model,
        replica=replica,
        direction=optim.build_direction(config),
        schedule=optim.build_schedule(config, length),
    )
    for section, stem in (("eval", "every"), ("log", "every"), ("checkpoint", "every")):
        length.steps(config[section], stem, section)
    try:
        params = parts.abstract_variables()["params"]
    except (ValueError, TypeError, ZeroDivisionError) as error:
        kind, data = config.model.kind, config.data.name
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {kind!r} cannot take the images of {data!r}: {reason}") from error
    _check_eval_size(parts)
    optim.check_agc(config, params)
    check_overrides(model, parts.info.image_shape, config.norm_overrides)
    check_probe(config, model, parts.info)
    return parts


def _check_eval_size(parts: Parts) -> None:
    """Raises UserError if the model, made for the training's images, cannot take the evaluated."""
    shape = evaluated(parts.info, parts.config.data).image_shape
    if shape == parts.info.image_shape:
        return
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    try:
        jax.eval_shape(
            lambda v, x: parts.model.apply(v, x, train=False), parts.abstract_variables(), images
        )
    except (ValueError, TypeError, ZeroDivisionError, ScopeParamShapeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"config field 'data.eval_image_size' = {shape[0]}: model {parts.config.model.kind!r} "
            f"made for {parts.info.image_shape[0]} pixels cannot take it: {reason}"
        ) from error


def _check_layout(config: ConfigDict, layout: Layout, norm: NormFactory) -> None:
    """Raises UserError where the batch's layout would change its statistics."""
    if not norm.stateful:
        return
    scope, parts = config.batch_stats, layout.microbatches
    if scope.scope == "device" and layout.padded:
        raise UserError(
            f"config field 'parallel.pad_batch' = true: {config.train.batch_size} examples are no "
            f"equal shares of {parallel.num_devices(config)} devices, which batch_stats.scope = "
            "'device' needs; choose another batch size, or scope ghost"
        )
    if parts > 1:
        field = f"config field 'train.microbatches' = {parts}"
        instead = "'train.remat' = true saves memory and changes no number"
        for kind in _kinds(config):
            if NORMS[kind].stateful and not NORMS[kind].averages_groups:
                raise UserError(
                    f"{field}: the running statistics of {kind!r} are of whole batches; {instead}"
                )
        if scope.scope != "ghost":
            raise UserError(
                f"{field}: statistics of scope {scope.scope!r} need the whole batch at each layer "
                "(those of the second depend on the first's, and gradients cross microbatches); "
                f"choose batch_stats.scope=ghost with ghost_size {layout.examples}, or {instead}"
            )
        if layout.examples % scope.ghost_size:
            raise UserError(
                f"{field}: ghost size {scope.ghost_size} does not divide microbatches of "
                f"{layout.examples}"
            )
    if scope.scope == "ghost" and layout.replicas is not None:
        try:
            layout.check_ghosts(scope.ghost_size)
        except ValueError as error:
            raise UserError(f"config field 'parallel.mode' = 'pmap': {error}; use jit") from error


def _check_norm(norm: NormFactory) -> None:
    """Raises UserError for a field with which a normalizer cannot be made, on any input."""
    x = jax.ShapeDtypeStruct((2, 4, 4, 32), jnp.float32)
    try:
        jax.eval_shape(lambda x: norm.module.init(jax.random.key(0), x, train=True), x)
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"config section 'norm' cannot be made a normalizer: {reason}") from error


def run_identity(config: ConfigDict) -> dict[str, Any]:
    """Returns the run's identity (`config.identity`) on this machine's devices."""
    stateful = any(NORMS[kind].stateful for kind in _kinds(config))
    return identity(config, stateful=stateful, num_devices=parallel.num_devices(config))


def _kinds(config: ConfigDict) -> list[str]:
    """Returns the config names of the normalizers that a model has."""
    return [config.norm.kind, *(kind for _, kind in parse_overrides(config.norm_overrides))]


def shared_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that all processes of a run must have the same; paths may differ."""
    own = ("source", "data.path", "parallel.compilation_cache")
    return {name: value for name, value in flatten(to_json(config)).items() if name not in own}


def id_of(config: ConfigDict) -> str:
    """Returns the run's id: 12 hex digits."""
    return run_id(run_identity(config))


_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**32 - 1),
    ("train.max_nonfinite", 1, 2**31 - 1),
    ("train.label_smoothing", 0.0, 1.0),
    ("train.ema_decay", 0.0, 1.0),
    ("eval.batch_size", 1, 2**31 - 1),
    ("checkpoint.keep", 1, math.inf),
    ("data.image_size", 1, 4096),
    ("data.eval_image_size", 1, 4096),
    ("data.crop_area", 0.0, 1.0),
    ("data.eval_crop", 1 / 1024, 1.0),
    ("data.crop_padding", 0, 1024),
    ("data.cutout_size", 0, 1024),
    ("data.mixup_share", 0.0, 1.0),
    ("data.cutmix_share", 0.0, 1.0),
    ("data.randaugment_layers", 0, 16),
    ("data.randaugment_magnitude", 0, 30),
    ("optim.base_lr", 0.0, math.inf),
    ("optim.weight_decay", 0.0, math.inf),
    ("optim.clip_norm", 0.0, math.inf),
    ("optim.decay_factor", 0.0, 1.0),
    ("optim.momentum", 0.0, 1.0),
    ("optim.b1", 0.0, 1.0),
    ("optim.b2", 0.0, 1.0),
    ("model.widths", 1, 2**31 - 1),
    ("model.hidden_width", 0, 2**31 - 1),
    ("model.strides", 1, 2**31 - 1),
    ("model.width", 1, 2**31 - 1),
    ("model.depth", 1, 10_000),
    ("model.mlp_ratio", 1, 2**31 - 1),
    ("model.patch_size", 1, 2**31 - 1),
    ("model.num_heads", 1, 2**31 - 1),
    ("model.permutation_seed", 0, 2**32 - 1),
    ("model.stage_sizes", 1, 2**31 - 1),
    ("model.alpha", 0.0, math.inf),
    ("model.skip_gain", 0.0, math.inf),
    ("model.squeeze_excite", 0.0, 1.0),
    ("model.stochastic_depth", 0.0, 0.99),
    ("model.dropout", 0.0, 0.99),
    ("model.block_dropout", 0.0, 0.99),
    ("model.head_deviation", 0.0, math.inf),
    ("model.expansion", 2**-10, math.inf),
    ("model.final_expansion", 2**-10, math.inf),
    ("model.group_width", 1, 2**31 - 1),
    ("model.widen_factor", 1, 2**31 - 1),
    ("conv.epsilon", 0.0, math.inf),
    ("norm.momentum", 0.0, 1.0),
    ("norm.epsilon", 0.0, math.inf),
    ("norm.num_groups", 1, 2**31 - 1),
    ("norm.group_size", 1, 2**31 - 1),
    ("norm.window", 1, 2**31 - 1),
    ("norm.num_iterations", 0, 2**31 - 1),
    ("norm.backward_momentum", 0.0, 1.0),
    ("norm.inference_weight", 0.0, 1.0),
    ("norm.proxy_epsilon", 0.0, math.inf),
    ("norm.correction_max", 1.0, math.inf),
    ("norm.limit", 1e-6, math.inf),
    ("norm.r_max", 1.0, math.inf),
    ("norm.d_max", 0.0, math.inf),
)
"""Lowest and highest value of each numeric field, both allowed, where the config has the field."""


def _check_dtypes(config: ConfigDict) -> None:
    """Raises UserError for a dtype that is not of floating point numbers."""
    for name, value in flatten(config).items():
        if name.rpartition(".")[2] not in ("dtype", "param_dtype") or value is None:
            continue
        try:
            floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
        except TypeError:
            floating = False
        if not floating:
            raise unknown(repr(name), value, ("float32", "bfloat16", "float16", "float64"))


def _check_numbers(config: ConfigDict) -> None:
    fields = flatten(config)
    for name, low, high in _LIMITS:
        value = fields.get(name)
        if value is None:
            continue
        parts = value if isinstance(value, tuple) else (value,)
        if not all(low <= part <= high for part in parts):
            allowed = f"{low} or more" if math.isinf(high) else f"from {low} to {high}"
            each = "each " if isinstance(value, tuple) else ""
            raise UserError(f"config field {name!r} = {value} must {each}be {allowed}")

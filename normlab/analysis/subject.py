"""What a probe looks at: a model at its start or at a checkpoint, and batches to show it."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from normlab.data import fetch, train_indices
from normlab.errors import UserError, unknown
from normlab.training import parallel
from normlab.training.evaluate import Variables
from normlab.training.examples import RunData, load_data
from normlab.training.restore import restore
from normlab.training.setup import Parts, build_parts, id_of
from normlab.training.start import start_from_data
from normlab.training.state import create_state

INPUTS = ("gaussian", "data")


class Draw(NamedTuple):
    """A network and a batch for it, of one seed."""

    seed: int
    variables: Variables
    images: Array  # float32 [B, H, W, C]
    labels: Array  # int32 [B]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its draws; the batch is the training's, `train.batch_size`."""

    parts: Parts
    origin: dict[str, Any]  # what it is, for the record
    num_seeds: int
    inputs: str  # gaussian: each value N(0, 1), labels at random; data: of the training set
    variables: Variables | None = None  # of a checkpoint; None: each seed's initial ones
    compiler: parallel.Compiler = dataclasses.field(default_factory=parallel.Compiler)

    def draws(self) -> Iterator[Draw]:
        """Yields a draw for each seed, from the config's on.

        A checkpoint is shown other batches, a fresh model has other initial values, too.
        """
        config = self.parts.config
        needs_data = self.inputs == "data" or (
            self.variables is None and self.parts.model.conv.starts_from_data
        )
        data = load_data(config, parallel.make_mesh()) if needs_data else None
        for seed in range(config.seed, config.seed + self.num_seeds):
            variables = self._initial(seed, data) if self.variables is None else self.variables
            yield Draw(seed, variables, *self._batch(seed, data))

    def _initial(self, seed: int, data: RunData | None) -> Variables:
        seeded = copy.deepcopy(self.parts.config)
        seeded.seed = seed
        parts = dataclasses.replace(self.parts, config=seeded)
        state = create_state(parts, self.compiler)
        if data is not None and parts.model.conv.starts_from_data:
            state = start_from_data(parts, state, data, self.compiler)
        return state.variables()

    def _batch(self, seed: int, data: RunData | None) -> tuple[Array, Array]:
        info, size = self.parts.info, self.parts.length.batch_size
        if self.inputs == "gaussian" or data is None:
            images, labels = jax.random.split(jax.random.key(seed))
            shape = (size, *info.image_shape)
            return (
                jax.random.normal(images, shape),
                jax.random.randint(labels, (size,), 0, info.num_classes),
            )
        rows = train_indices(seed, 0, 1, size, len(data.train))
        [(examples, places)] = data.train.batches(rows)
        return fetch(examples, jnp.asarray(places), info)


def fresh(config: ConfigDict, *, num_seeds: int = 3, inputs: str = "gaussian") -> Subject:
    """Returns the config's model at its start; raises UserError for what does not fit together."""
    _check(num_seeds, inputs)
    parts = build_parts(config, need_data=inputs == "data")
    return Subject(parts, {"config": config.source, "step": 0}, num_seeds, inputs)


def of_run(
    folder: Path,
    *,
    step: int | None = None,
    use_ema: bool | None = None,
    data_path: str | None = None,
    num_seeds: int = 3,
    inputs: str = "data",
) -> Subject:
    """Returns the model of a run's checkpoint: of `step`, or the newest good one.

    `use_ema` None: the weights as the config's `eval.use_ema`. Raises UserError as
    `restore.restore` does, and if moving averages are asked for that the run did not keep.
    """
    _check(num_seeds, inputs)
    compiler = parallel.Compiler()
    parts, step, state = restore(folder, step, data_path=data_path)
    if use_ema and state.ema is None:
        raise UserError(f"run {str(folder)!r} kept no moving averages (train.ema_decay is none)")
    chosen = parts.config.eval.use_ema if use_ema is None else use_ema
    weights = "ema" if chosen and state.ema is not None else "raw"
    origin = {
        "run": id_of(parts.config),
        "config": parts.config.source,
        "step": step,
        "weights": weights,
    }
    return Subject(parts, origin, num_seeds, inputs, state.variables(chosen), compiler)


def _check(num_seeds: int, inputs: str) -> None:
    if num_seeds < 1:
        raise UserError(f"--seeds={num_seeds} must be 1 or more")
    if inputs not in INPUTS:
        raise unknown("input", inputs, INPUTS)

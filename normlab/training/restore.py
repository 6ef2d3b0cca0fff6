"""A run's checkpoint, back in memory."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from normlab import run
from normlab.config import from_json, shown
from normlab.errors import UserError
from normlab.training import checkpoint, parallel
from normlab.training.evaluate import Evaluator, Variables, by_split
from normlab.training.examples import RunData, load_data
from normlab.training.setup import Parts, build_parts, id_of, run_identity
from normlab.training.state import TrainState, abstract_state


def saved_config(folder: Path) -> ConfigDict:
    """Returns the config of a run's folder.

    Raises UserError, one line, if there is none, if it cannot be reloaded, or if it is not the one
    that the run was: a flipped bit may leave a config that loads.
    """
    saved = run.read_json(folder / "config.json")
    if saved is None:
        raise UserError(f"{str(folder)!r} is not a run folder: it has no config.json")
    config = from_json(saved, folder)
    then = run.read_json(folder / "identity.json")
    if then is None:  # of what no training made, as weights that were imported
        return config
    now = run_identity(config)
    for identity in (then, now):  # the number of devices is this machine's, and was that one's
        if isinstance(identity.get("batch_stats"), dict):
            identity["batch_stats"].pop("groups", None)
    if difference := run.first_difference(then, now):
        name, old, new = difference
        raise UserError(
            f"{folder / 'config.json'} or identity.json is damaged: {name} is {shown(new)} in the "
            f"one and {shown(old)} in the other"
        )
    return config


def restore(
    folder: Path,
    step: int | None,
    *,
    batch_size: int | None = None,
    data_path: str | None = None,
) -> tuple[Parts, int, TrainState]:
    """Returns (parts, step, state) of a run's checkpoint: of `step`, or the newest good one.

    Raises UserError, one line, if the folder is no run, or has no such or no good checkpoint.
    """
    config = saved_config(folder)
    if batch_size is not None:
        config.eval.batch_size = batch_size
    if data_path is not None:
        config.data.path = data_path
    parts = build_parts(config)
    like = abstract_state(parts)
    checkpoints = folder / "checkpoints"
    there = checkpoint.steps(checkpoints)
    if not there:
        raise UserError(f"run {str(folder)!r} has no checkpoint")
    identity = run.read_json(folder / "manifest.json") or {}
    facts = {"run": identity.get("id", id_of(config)), "seed": config.seed}
    if step is None:
        found = checkpoint.latest(checkpoints, like, facts)
        if found is None:
            raise UserError(f"run {str(folder)!r} has no good checkpoint")
        return parts, found[0], found[1]
    if step not in there:
        nearest = min(there, key=lambda other: abs(other - step))
        raise UserError(f"run {str(folder)!r} has no checkpoint of step {step}; nearest: {nearest}")
    state, _ = checkpoint.load(checkpoints / str(step), like, facts)
    return parts, step, state


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of a run with all that it takes to measure it."""

    parts: Parts
    step: int
    state: TrainState
    use_ema: bool  # which weights were asked for
    variables: Variables  # those weights and their statistics, on the devices
    data: RunData
    evaluator: Evaluator


def open_run(
    folder: Path,
    *,
    step: int | None = None,
    use_ema: bool | None = None,
    batch_size: int | None = None,
    data_path: str | None = None,
) -> Opened:
    """Returns a run's checkpoint, ready to be measured.

    `use_ema` None: as the config says. Raises UserError as `restore` does, and if moving averages
    are asked for that the run did not keep.
    """
    compiler = parallel.Compiler()
    parts, step, state = restore(folder, step, batch_size=batch_size, data_path=data_path)
    parallel.enable_compilation_cache(parts.config)
    if use_ema and state.ema is None:
        raise UserError(f"run {str(folder)!r} kept no moving averages (train.ema_decay is none)")
    mesh = parallel.make_mesh(parts.config)
    chosen = parts.config.eval.use_ema if use_ema is None else use_ema
    return Opened(
        parts=parts,
        step=step,
        state=state,
        use_ema=chosen and state.ema is not None,
        variables=parallel.replicate(state.variables(chosen), mesh),
        data=load_data(parts.config, mesh),
        evaluator=Evaluator(parts.model, parts.info, mesh, compiler),
    )


def evaluate_run(folder: Path, **settings: Any) -> dict[str, Any]:
    """Returns the test metrics of a run's checkpoint, in all the ways of `Evaluator.all_ways`.

    `settings` as of `open_run`, which says what is refused.
    """
    there = open_run(folder, **settings)
    metrics = there.evaluator.all_ways(there.parts, there.variables, there.data)
    return {"step": there.step, **by_split(metrics)}

"""What receives each line of metrics beside metrics.jsonl: TensorBoard's files, Weights & Biases.

A sink is a function of a line. None of them can end a run, hold it up or change a number in it: one
that fails is named once in the log and gets no more lines.
"""

import contextlib
import functools
import json
import logging
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from normlab import run
from normlab.config import flatten, to_json
from normlab.errors import UserError

_LOG = logging.getLogger(__name__)

Sink = Callable[[Mapping[str, Any]], None]
"""Takes a line as metrics.jsonl has it: `step`, `split`, and numbers by name."""


def check_sinks(config: ConfigDict) -> None:
    """Raises UserError if the config asks for Weights & Biases and the package is not there."""
    if config.log.wandb_project is not None:
        _import_wandb(config.log.wandb_project)


@contextlib.contextmanager
def open_sinks(config: ConfigDict, folder: Path, run_id: str, step: int) -> Iterator[Sink]:
    """Yields the sink of a run in `folder` that starts, or goes on, at `step`.

    What an earlier process told of later steps is taken back where the sink can do so.
    """
    with contextlib.ExitStack() as closing:
        sinks = []
        if config.log.tensorboard:
            sinks.append(_guarded("TensorBoard", lambda: _tensorboard(config, folder, step)))
        if config.log.wandb_project is not None:
            opener = functools.partial(_wandb, config, folder, run_id, closing)
            sinks.append(_guarded("Weights & Biases", opener))

        def send(line: Mapping[str, Any]) -> None:
            for sink in sinks:
                sink(line)

        yield send


def _guarded(name: str, open_sink: Callable[[], Sink]) -> Sink:
    """Opens a sink; returns one that, instead of raising, warns once and does nothing more."""
    sink: Sink | None = None

    def give_up(error: Exception) -> None:
        nonlocal sink
        sink = None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        _LOG.warning("%s gets no more lines of this run: %s", name, reason)

    def send(line: Mapping[str, Any]) -> None:
        if sink is not None:
            try:
                sink(line)
            except Exception as error:
                give_up(error)

    try:
        sink = open_sink()
    except Exception as error:
        give_up(error)
    return send


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns {split/metric: value} of a line's finite numbers."""
    found = {f"{line['split']}/{name}": value for name, value in line.items() if name != "step"}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, (int, float)) and run.finite_or_none(value) is not None
    }


# TensorBoard -------------------------------------------------------------------------------------


def _tensorboard(config: ConfigDict, folder: Path, step: int) -> Sink:
    """Returns the sink that appends to a new event file in RUN/tensorboard/.

    The library's own writer hands events to a thread over a bounded queue, and a full disk, which
    ends the thread, would hold the run up for ever. So only its messages and checksum are used: a
    line is one record, written at once.
    """
    with _not_importable("torch", "comet_ml", "boto3"):  # tensorboardX would load them, if there
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import text

    target = folder / "tensorboard"
    target.mkdir(exist_ok=True)
    # A file for each process, read by TensorBoard in the order of their names.
    path = target / f"events.out.tfevents.{len(list(target.iterdir())):05d}"

    def append(**fields: Any) -> None:
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        header = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (header, data)]
        with path.open("ab") as file:
            file.write(header + checks[0] + data + checks[1])

    def send(line: Mapping[str, Any]) -> None:
        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers(line).items()]
        append(step=line["step"], summary=Summary(value=values))

    append(file_version="brain.Event:2")
    # Takes back everything from this step on; lines of this very step may stand, and are told anew.
    append(step=step, session_log=SessionLog(status=SessionLog.START))
    if step == 0:
        append(summary=text("config", _as_markdown(config)))
    for line in run.read_lines(folder / "metrics.jsonl"):
        if line.get("step") == step:
            send(line)
    return send


def _as_markdown(config: ConfigDict) -> str:
    return "\n".join(f"    {line}" for line in json.dumps(to_json(config), indent=2).splitlines())


@contextlib.contextmanager
def _not_importable(*names: str) -> Iterator[None]:
    """Makes packages that are not loaded yet look absent within the block."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


# Weights & Biases --------------------------------------------------------------------------------


def _import_wandb(project: str) -> Any:
    try:
        import wandb

        wandb.init  # noqa: B018 - a folder `wandb`, which the package leaves, is importable, too
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"config field 'log.wandb_project' = {project!r} needs a package that is not there; "
            "pip install wandb"
        ) from error
    return wandb


def _wandb(config: ConfigDict, folder: Path, run_id: str, closing: contextlib.ExitStack) -> Sink:
    """Returns the sink that logs to the run `run_id` of a project; a resumed run goes on there.

    Steps that are told again after a resume are passed over there: the first telling was the same.
    """
    wandb = _import_wandb(config.log.wandb_project)
    opened = wandb.init(
        project=config.log.wandb_project,
        id=run_id,
        name=folder.name,
        dir=str(folder),
        resume="allow",
        config=flatten(to_json(config)),
        tags=_labels(config, folder, run_id),
        settings=wandb.Settings(silent=True, console="off"),
    )

    def finish(kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(Exception):
            opened.finish(exit_code=0 if kind is None else 1)

    closing.push(finish)
    return lambda line: opened.log(numbers(line), step=line["step"])


def _labels(config: ConfigDict, folder: Path, run_id: str) -> list[str]:
    """Returns what the run is called: data, model, normalizer, seed and, in a sweep, setting."""
    plan = run.read_json(folder.parent / run.SWEEP) or {}
    entries = [entry for entry in plan.get("runs", []) if entry.get("id") == run_id]
    settings = [str(entry["labels"]["setting"]) for entry in entries]
    names = [config.data.name, config.model.kind, config.norm.kind, f"seed {config.seed}"]
    return [name[:64] for name in dict.fromkeys([*names, *settings]) if name]

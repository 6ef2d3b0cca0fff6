"""The training loop: one run, from its config to its result.

Everything that decides a number is a function of (config, step): data order and augmentation are
keyed by (seed, step), the schedule reads the state's step, and the sums behind a metrics line are
part of the state. So a run that was killed and resumed ends with the bytes of one that was not.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from normlab import models, run
from normlab.data import order_hash, train_indices
from normlab.training import checkpoint, parallel, processes
from normlab.training.evaluate import Evaluator, Variables, by_split
from normlab.training.examples import RunData, load_data
from normlab.training.memory import HighWaterMark
from normlab.training.probe import layer_metrics, unit_percentiles
from normlab.training.programs import Programs
from normlab.training.record import check_fingerprint, describe_run, note_groups
from normlab.training.replicas import Seat, on_one_device
from normlab.training.setup import Parts, build_parts, id_of, run_identity, shared_config
from normlab.training.signals import Interrupted, Signals
from normlab.training.sinks import Sink, check_sinks, open_sinks
from normlab.training.start import start_from_data
from normlab.training.state import CULPRITS, Totals, TrainState, create_state
from normlab.training.step import how_to_step

_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int, Mapping[str, Any] | None], None]
"""Called as progress(step, num_steps, metrics line); the line is None for a sign of life."""

HEARTBEAT_SECONDS = 10.0

EVENTS = ("log", "eval", "checkpoint")


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    seat: Seat | None = None,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Trains the run of `config` in the folder `workdir`, resuming what is there.

    Returns the final metrics, as in result.json: `test_accuracy`, `test_loss`, ..., `status`
    ("done" or "diverged"), `steps`, `seconds`, `compile_seconds`, `examples_per_second`,
    `num_params`. `overrides` are noted in the manifest. Raises UserError before anything is
    compiled or written if the config or the folder is wrong, or the data are no longer those that
    the run began with, and Interrupted after a SIGINT or SIGTERM. Where several processes share the
    run (`training/processes.py`), process 0 alone has the folder, and all raise what one raises.
    With a `seat` the run is one of several in this process (`training/replicas.py`). `programs`
    are those of this process's earlier runs, and come to hold this one's.
    """
    if seat is not None:
        config = on_one_device(config)
    folder = Path(workdir)
    parts = processes.agreed(lambda: build_parts(config))
    processes.check_same("config field", shared_config(config))
    with contextlib.ExitStack() as held:

        def take_folder() -> dict[str, Any] | None:
            check_sinks(config)
            run.open_folder(folder, run_identity(config))
            held.enter_context(run.locked(folder))
            finished = run.read_result(folder)
            if finished is not None:
                run.note_result(folder, finished)
            return finished

        finished = processes.from_first(take_folder)
        if finished is not None:
            return finished
        with _noted(folder):
            began = time.perf_counter()
            parallel.enable_compilation_cache(config)
            mesh = parallel.make_mesh(config) if seat is None else seat.mesh
            data = processes.agreed(lambda: load_data(config, mesh))
        processes.check_same("data's", {"fingerprint": data.fingerprint})
        processes.from_first(lambda: check_fingerprint(folder, config, data.fingerprint))
        with _noted(folder):
            kept = None if programs is None else programs.of(config, parts.info, parts.length)
            compiler = parallel.Compiler(parallel.in_order(config), kept, mesh)
            made = _Run(parts, folder, overrides or {}, progress, mesh, data, began, seat, compiler)
            return made.finish()


@contextlib.contextmanager
def _noted(folder: Path) -> Iterator[None]:
    """Notes in the run's folder what the block says and how it fails."""
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(run.log_to(folder / "log.txt"))
            stack.enter_context(run.failure_noted(folder))
        stack.enter_context(processes.losses_named())
        yield


class _Run:
    """One run in progress: its parts, its data on the device, its state and its clock."""

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        overrides: Mapping[str, Any],
        progress: Progress | None,
        mesh: Mesh,
        data: RunData,
        began: float,
        seat: Seat | None,
        compiler: parallel.Compiler,
    ) -> None:
        config = parts.config
        self.parts, self.folder, self.progress = parts, folder, progress
        self.mesh, self.data, self.seat = mesh, data, seat
        self.clock, self.last_sign = began, time.perf_counter()
        self.compiler = compiler
        self.memory = HighWaterMark()
        self.evaluator = Evaluator(parts.model, parts.info, self.mesh, self.compiler)
        how = how_to_step(parts, self.mesh)
        self.take_steps = parallel.take_steps(*how, self.compiler)
        if seat is not None:
            self.take_steps = seat.taking(
                parallel.steps_program(*how), self.take_steps, self.compiler
            )

        state = create_state(parts, self.compiler)
        if parts.model.conv.starts_from_data:
            state = start_from_data(parts, state, self.data, self.compiler)
        self.num_params = models.count_params(state.params)
        self.facts = {"run": id_of(config), "seed": config.seed, "data": self.data.fingerprint}
        self.writes = processes.is_first()
        self.before: dict[str, float] = {}  # seconds spent by earlier processes on this run
        self.saved: int | None = None  # step of the newest checkpoint
        self.train_seconds = 0.0
        if self.writes:
            state = self._take_up(state, overrides)
        self.state: TrainState = parallel.replicate(processes.broadcast(state), self.mesh)
        self.step = int(self.state.step)
        self.flag = processes.Flag()
        if self.writes:
            run.write_status(folder, "running", self.step)
        self._show(None)

    def _take_up(self, state: TrainState, overrides: Mapping[str, Any]) -> TrainState:
        """Returns the state that the folder's run goes on from, `state` if it has not begun."""
        config, folder = self.parts.config, self.folder
        order = order_hash(config.seed, self.parts.length.batch_size, len(self.data.train))
        describe_run(self.parts, folder, overrides, self.data.fingerprint, order, state.params)
        note_groups(self.parts)
        manifest: dict[str, Any] = {}
        checkpoint.discard_unfinished(folder / "checkpoints")
        resumed = checkpoint.latest(
            folder / "checkpoints", state, self.facts, lambda mark: run.log_fault(folder, mark)
        )
        if resumed:
            self.saved, state, manifest = resumed
            _LOG.info("resumed at step %d", self.saved)
        run.truncate_logs(folder, manifest.get("log_bytes", {}))
        self.before = run.last_timing(folder)
        return state

    def finish(self) -> dict[str, Any]:
        """Trains to the end and returns the result, which stands in result.json then."""
        noted = Signals() if self.seat is None else contextlib.nullcontext(self.seat.room.signals)
        with noted as signals, self._opened_sinks() as self.send:
            if self.step == 0 and (watched := self._watch()):
                self._log({"step": 0, "split": "layers", **watched})
            while self.step < self.parts.length.num_steps and not self._diverged():
                due = self._next_events()
                event = min(due.values())
                self._advance(event, signals)
                arrived = [name for name in EVENTS if self.step == due[name]]
                if self._diverged():
                    arrived = ["log", "checkpoint"]
                if "log" in arrived:
                    self._log_training()
                if "eval" in arrived and self.step < self.parts.length.num_steps:
                    self._evaluate()
                if stopped := self.flag(signals.received or 0):
                    self._save()
                    raise Interrupted(stopped, self.step)
                if "checkpoint" in arrived:
                    self._save()
            # One of several would leave the others behind.
            if not processes.are_several() and self.seat is None:
                signals.saved(self.step)
            return self._conclude()

    def _opened_sinks(self) -> contextlib.AbstractContextManager[Sink | None]:
        if not self.writes:
            return contextlib.nullcontext()
        return open_sinks(self.parts.config, self.folder, self.facts["run"], self.step)

    def _next_events(self) -> dict[str, int]:
        """Returns the step of the next event of each kind; the end of the run is one of each."""
        length, due = self.parts.length, {}
        for name in EVENTS:
            every = length.steps(self.parts.config[name], "every", name)
            every = length.num_steps if every is None else max(every, 1)
            due[name] = min((self.step // every + 1) * every, length.num_steps)
        return due

    def _advance(self, until: int, signals: Signals) -> None:
        """Takes steps up to `until`, fewer if a signal came or the run diverged.

        Waits for the device at the end, and now and then to see whether the run has diverged.
        """
        config, first = self.parts.config, self.step
        together = parallel.steps_per_dispatch(config, resident=self.parts.info.one_size)
        seed = parallel.seed_array(config.seed)
        indices = train_indices(
            config.seed, first, until - first, self.parts.length.batch_size, len(self.data.train)
        )
        compiled_before, start = self._compile_seconds(), time.perf_counter()
        seated_before = self.seat.seconds if self.seat else 0.0
        looked = self.step
        made = self.data.train.steps(config.seed, first, indices, together)
        with contextlib.closing(made) as batches:
            for data, rows in batches:
                if self.flag(signals.received or 0):
                    break
                self.state = self.take_steps(self.state, data, seed, rows)
                self.step += len(rows)
                self._heartbeat()
                if self.step - looked >= config.train.max_nonfinite:
                    looked = self.step
                    if self._diverged():
                        break
        self.step = int(self.state.step)
        compiling = self._compile_seconds() - compiled_before
        spent = time.perf_counter() - start - compiling
        self.train_seconds += spent if self.seat is None else self.seat.seconds - seated_before

    def _step_compiler(self) -> parallel.Compiler:
        return self.compiler if self.seat is None else self.seat.compiler

    def _compile_seconds(self) -> float:
        """Returns the time that this run has spent, or waited, for compilation."""
        return self.compiler.seconds + (self.seat.compiler.seconds if self.seat else 0.0)

    def _diverged(self) -> bool:
        return bool(self.state.health.diverged)

    def _heartbeat(self) -> None:
        if self.progress and time.perf_counter() - self.last_sign > HEARTBEAT_SECONDS:
            jax.block_until_ready(self.state)  # dispatch runs ahead of the device
            self._show(None)

    def _show(self, line: Mapping[str, Any] | None) -> None:
        if self.progress:
            self.progress(self.step, self.parts.length.num_steps, line)
            self.last_sign = time.perf_counter()

    # Events --------------------------------------------------------------------------------------

    def _log_training(self) -> None:
        """Writes the means over the steps since the last line, and starts new sums."""
        totals: Totals = jax.device_get(self.state.totals)
        accepted = int(totals.steps)
        if int(totals.nonfinite):
            _LOG.warning("%d steps up to %d were not finite", int(totals.nonfinite), self.step)
        self._log(
            {
                "step": self.step,
                "split": "train",
                "loss": float(totals.loss) / accepted if accepted else None,
                "accuracy": int(totals.correct) / (accepted * self.parts.length.batch_size)
                if accepted
                else None,
                "learning_rate": float(self.parts.schedule(self.step - 1)),
                "gradient_norm": float(totals.gradient_norm) / accepted if accepted else None,
                "nonfinite": int(totals.nonfinite),
            }
        )
        means = {name: float(total) / max(accepted, 1) for name, total in totals.measures.items()}
        layers = (means if accepted else {}) | self._watch()
        if layers:
            self._log({"step": self.step, "split": "layers", **layers})
        zeros = parallel.replicate(Totals.zeros(totals.measures), self.mesh)
        self.state = self.state.replace(totals=zeros)

    def _watch(self) -> dict[str, float]:
        """Returns what `probe.layers` and `probe.signals` ask for, of the last step's batch.

        At the start, of the first step's.
        """
        parts = self.parts
        if not (parts.config.probe.layers or parts.config.probe.signals):
            return {}
        return layer_metrics(
            parts.config,
            parts.model,
            parts.info,
            self.compiler,
            self.mesh,
            self.state.variables(),
            max(self.step - 1, 0),
            self.data.train,
        )

    def _log(self, line: Mapping[str, Any]) -> None:
        if self.send is None:
            return
        run.append_line(self.folder / "metrics.jsonl", line)
        self.send(line)
        self._time()
        self._show(line)

    def _time(self) -> None:
        run.append_line(self.folder / "timing.jsonl", {"step": self.step, **self._timing()})

    def _timing(self) -> dict[str, float]:
        """Returns seconds since the run began, over all its processes, compilation apart."""
        spent = time.perf_counter() - self.clock - self._compile_seconds()
        now = {
            "seconds": spent,
            "train_seconds": self.train_seconds,
            "compile_seconds": self._compile_seconds(),
        }
        # A clock that was set back must not take away what earlier processes spent.
        return {name: round(self.before.get(name, 0.0) + max(now[name], 0.0), 6) for name in now}

    def _save(self) -> None:
        """Writes the checkpoint of this step, once: a signal may come while it is written."""
        if not self.writes or self.saved == self.step:
            return
        self._time()
        facts = self.facts | run.log_mark(self.folder)
        checkpoint.save(self.folder / "checkpoints", self.step, self.state, facts)
        checkpoint.keep_newest(self.folder / "checkpoints", self.parts.config.checkpoint.keep)
        self.saved = self.step

    # Evaluation ----------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        variables = self.state.variables(self.parts.config.eval.use_ema)
        batch_size = self.parts.config.eval.batch_size
        for split, examples in self.data.evaluated.items():
            metrics = self.evaluator.running(variables, examples, batch_size)
            self._log({"step": self.step, "split": split, **metrics})
        self._probe(variables)

    def _probe(self, variables: Variables) -> None:
        parts = self.parts
        if parts.config.probe.layer is None:
            return
        found = unit_percentiles(
            parts.config,
            parts.model,
            parts.info,
            self.compiler,
            variables,
            self.data.evaluated["test"],
        )
        self._log({"step": self.step, "split": "probe", **found})

    def _conclude(self) -> dict[str, Any]:
        """Evaluates the final state in all its ways and writes the result and the status."""
        health = jax.device_get(self.state.health)
        diverged = bool(health.diverged)
        variables = self.state.variables(self.parts.config.eval.use_ema)
        final = self.evaluator.all_ways(self.parts, variables, self.data, recompute=not diverged)
        for split, metrics in final.items():
            self._log({"step": self.step, "split": split, **metrics})
        self._probe(variables)
        timing = self._timing()
        steps_seconds = timing["train_seconds"] / max(self.step, 1)
        result: dict[str, Any] = {
            "status": "diverged" if diverged else "done",
            **by_split(final),
            "train_loss": run.last_train_loss(self.folder) if self.writes else None,
            "steps": self.step,
            "seconds": timing["seconds"],
            "compile_seconds": timing["compile_seconds"],
            "step_seconds": steps_seconds,
            # No seconds are known where timing.jsonl was lost after the last step.
            "examples_per_second": self.parts.length.batch_size / steps_seconds
            if steps_seconds
            else None,
            "num_params": self.num_params,
            "peak_memory_bytes": self.memory.bytes(),
            "step_memory_bytes": self._step_compiler().planned_bytes("train"),
        }
        message = ""
        if diverged:
            result["diverged_metric"] = CULPRITS[int(health.culprit)]
            result["diverged_step"] = int(health.first_step)
            message = (
                f"{result['diverged_metric']} not finite from step {result['diverged_step']}, "
                f"{int(health.streak)} steps in a row"
            )
            _LOG.warning("diverged: %s", message)
        clean = {name: run.finite_or_none(value) for name, value in result.items()}
        if self.writes:
            run.write_json(self.folder / "result.json", clean)
            run.write_status(self.folder, result["status"], self.step, message)
        return processes.exchange(clean)[0]

"""Measures what scale costs: many devices, many runs, a large report, the start of a run.

    python scripts/bench_scale.py devices     # a step on 1, 2, 4, 8 virtual devices
    python scripts/bench_scale.py sweep       # overhead a run at 10, 100, 1,000 trivial runs
    python scripts/bench_scale.py report      # seconds and memory at 1,000 runs × 1,000 lines
    python scripts/bench_scale.py startup     # from the command line to the first step
    python scripts/bench_scale.py communication  # what normalizers ask of the network

Each prints a table, with --markdown one for a page. Whatever is timed runs in processes of its own.
"""

import argparse
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_tools import (
    ROOT,
    Rows,
    environment,
    flags,
    folder,
    machine,
    normlab,
    serving,
    show,
    take_turns,
    timed_process,
)

HERE = Path(__file__).resolve()

TRIVIAL = {
    "model.widths": "(4,8)",
    "model.strides": "(2,2)",
    "train.num_steps": "2",
    "data.num_validation": "0",
}
"""A run of which next to nothing is training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name, (measure, options) in BENCHMARKS.items():
        command = commands.add_parser(name, help=(measure.__doc__ or "").splitlines()[0])
        command.add_argument("--markdown", action="store_true", help="a table for a page")
        for option, (default, meaning) in options.items():
            kind = str if default is None else type(default)
            command.add_argument(option, default=default, type=kind, help=meaning)
    for name, serve in SERVERS.items():
        server = commands.add_parser(name)
        server.add_argument("arguments", nargs=argparse.REMAINDER)
        server.set_defaults(serve=serve)
    args = parser.parse_args()
    if hasattr(args, "serve"):
        args.serve(*args.arguments)
        return
    heading, columns, rows, notes = BENCHMARKS[args.what][0](args)
    print(f"{heading}; {machine()}\n")
    show(columns, rows, args.markdown)
    for note in notes:
        print(f"\n{note}")


# Devices -----------------------------------------------------------------------------------------

MODES = ("jit", "pmap")


def devices(args: argparse.Namespace) -> Any:
    """A training step on 1, 2, 4, 8 virtual devices, against the ideal."""
    counts = [int(count) for count in args.counts.split(",")]
    rows: Rows = []
    for what in ("batch", "batch a device"):
        share = args.batch_size // max(counts)
        sizes = {n: share * n if what == "batch a device" else args.batch_size for n in counts}
        names = [(mode, n) for n in counts for mode in MODES]
        servers = {
            name: serving(
                *(HERE, "serve-devices", args.config, name[0], sizes[name[1]], args.clock),
                devices=name[1],
            )
            for name in names
        }
        seconds = take_turns(servers, args.rounds)
        first = seconds["jit", counts[0]]
        for mode, count in names:
            own = seconds[mode, count]
            work = sizes[count] / sizes[counts[0]]
            over = statistics.median(b / (work * a) for a, b in zip(first, own, strict=True))
            time_ = f"{1e3 * statistics.median(own):.1f}"
            rows.append((f"fixed {what}", count, sizes[count], mode, time_, f"{over:.2f}"))
    return (
        f"A step of {args.config}, medians of {args.rounds} alternating turns, {args.clock} clock",
        ("", "devices", "batch", "mode", "ms a step", "of the ideal"),
        rows,
        [
            "Virtual devices share the same cores, so the ideal is the time of one device times "
            "the batch over its batch; what is above 1.00 is overhead."
        ],
    )


def serve_devices(source: str, mode: str, batch_size: str, clock: str) -> None:
    """Takes three steps for each line on stdin; answers with the seconds of the latter two."""
    from bench_parts import RandomTraining

    from normlab.config import load_config

    fields = {"parallel.mode": mode, "train.batch_size": batch_size}
    training = RandomTraining(load_config(source, fields))
    for _ in sys.stdin:
        training.step()  # untimed: in the others' turns the system may have taken the pages away
        now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        begin = now()
        training.step(), training.step()
        print((now() - begin) / 2, flush=True)


# Sweeps ------------------------------------------------------------------------------------------


def sweep(args: argparse.Namespace) -> Any:
    """What a run costs beside its training, in sweeps of trivial runs."""
    rows: Rows = []
    with folder(args.workdir) as where:
        for count in map(int, args.runs.split(",")):
            at = where / f"sweep-{count}"
            command = ["compare", "configs/digits.py", "--norms=none,batch_norm", *flags(TRIVIAL)]
            command += [f"--seeds={-(-count // 2)}", f"--jobs={args.jobs}", f"--workdir={at}"]
            seconds, processor, _ = timed_process(command)
            again, _, _ = timed_process(command)
            results = [json.loads(path.read_text()) for path in at.glob("*/result.json")]
            own = sum(result["seconds"] for result in results)
            compiling = sum(result["compile_seconds"] for result in results)
            over = seconds * args.jobs - own - compiling
            figures = (seconds, again, own, compiling, over, processor)
            per_run = (f"{figure / len(results):.3f}" for figure in figures[2:])
            rows.append((len(results), f"{seconds:.1f}", f"{again:.1f}", *per_run))
    return (
        f"A sweep of runs of two steps, {args.jobs} workers of one thread",
        (
            *("runs", "seconds", "again, all done"),
            *("own s a run", "compiling s a run", "overhead s a run", "processor s a run"),
        ),
        rows,
        [
            "Own seconds and compiling are the runs' (result.json); overhead is wall clock × "
            "workers less both: starting workers, planning, reporting, what happens before a run's "
            "clock starts. The same command again plans, skips every run and reports."
        ],
    )


# A report ----------------------------------------------------------------------------------------


def report(args: argparse.Namespace) -> Any:
    """Seconds and memory of `normlab report` on many long runs."""
    with folder(args.workdir) as where:
        sweep = where / f"{args.runs}x{args.lines}"
        if not (sweep / "sweep.json").exists():
            fabricate(sweep, args.runs, args.lines)
        rows: Rows = []
        for number in range(args.rounds):
            seconds, processor, peak = timed_process(["report", str(sweep)])
            rows.append((number + 1, f"{seconds:.1f}", f"{processor:.1f}", f"{peak:.0f}"))
        sizes = {path.name: path.stat().st_size / 2**20 for path in sweep.glob("report.*")}
        logs = sum(path.stat().st_size for path in sweep.glob("*/*.jsonl")) / 2**20
    written = ", ".join(f"{name} {size:.2f}" for name, size in sorted(sizes.items()))
    return (
        f"`normlab report`, {args.runs:,} runs × {args.lines:,} lines, {logs:.0f} MiB of logs",
        ("round", "seconds", "of a processor", "peak MiB"),
        rows,
        [f"MiB written: {written}"],
    )


def fabricate(sweep: Path, runs: int, lines: int) -> None:
    """Writes a sweep by normlab's own writers: one real run of two steps, and copies of it.

    The copies have their own id, seed, logs and result; the numbers in those are made up.
    """
    from normlab import grid, run
    from normlab.config import load_config, to_json
    from normlab.norms import NORMS
    from normlab.sweep import make_plan, write_plan

    norms, rates = list(NORMS)[:10], [0.01 * (k + 1) for k in range(10)]
    seeds = -(-runs // (len(norms) * len(rates)))
    points = grid.grid({"optim.base_lr": rates}) * grid.grid({"norm": norms})
    plan = make_plan("configs/digits.py", points, seeds=range(seeds), overrides=TRIVIAL)
    sweep.mkdir(parents=True)
    write_plan(plan, sweep)
    first = sweep / plan.runs[0].id
    normlab(["train", f"--config={plan.runs[0].source}", f"--workdir={first}", *flags(TRIVIAL)])
    manifest, result = (run.read_json(first / f"{name}.json") for name in ("manifest", "result"))
    assert manifest is not None
    assert result is not None
    for index, planned in enumerate(plan.runs[:runs]):
        where = sweep / planned.id
        where.mkdir(exist_ok=True)
        config = to_json(load_config(planned.source, planned.overrides))
        own = {"id": planned.id, "seed": config["seed"], "steps_per_epoch": 25}
        run.write_json(where / "config.json", config)
        run.write_json(where / "manifest.json", {**manifest, **own})
        for name in run.LOGS:
            (where / name).unlink(missing_ok=True)
        accuracy = write_logs(where, lines, index)
        run.write_json(where / "result.json", {**result, "test_accuracy": accuracy, "steps": lines})
        run.write_status(where, "done", lines)


def write_logs(where: Path, lines: int, index: int) -> float:
    """Writes logs of so many lines, half of them of training; returns the last accuracy."""
    from normlab import run

    accuracy = 0.0
    for line in range(lines):
        step = 10 * (line // 2 + 1)
        accuracy = round(0.98 - 0.88 / (1 + step / 100) + 1e-4 * ((7 * index + step) % 89), 6)
        loss = 2.3 / (1 + step / 100)
        record = {"step": step, "split": "test", "accuracy": accuracy, "loss": loss}
        if line % 2 == 0:
            more = {"learning_rate": 0.1 / step, "gradient_norm": loss / 3, "nonfinite": 0}
            record |= {"split": "train", **more}
        run.append_line(where / "metrics.jsonl", record)
        times = {"seconds": 0.02 * step, "train_seconds": 0.01 * step, "compile_seconds": 1.5}
        run.append_line(where / "timing.jsonl", {"step": step, **times})
    return accuracy


# Start-up ----------------------------------------------------------------------------------------

STAGES = {
    "normlab.config.load_config": "config",
    "normlab.training.loop.build_parts": "build",
    "normlab.training.loop.load_data": "data",
    "normlab.training.loop.create_state": "initial state",
    "normlab.training.loop.describe_run": "manifest",
    "normlab.training.parallel.Compiler.__call__": "trace and compile",
}
"""What happens up to the first step; each is charged its own time, without what it calls."""


def startup(args: argparse.Namespace) -> Any:
    """From the command line to the first step, with a cold and a warm compilation cache."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with folder(None) as where:
            for kind, stages in found.items():
                fields = {"parallel.compilation_cache": str(where / "cache")}
                command = [sys.executable, str(HERE), "serve-startup", str(time.time())]
                command += [f"--config={args.config}", f"--workdir={where / kind}", *flags(fields)]
                ended = subprocess.run(
                    command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
                )
                stages.append(json.loads(ended.stdout.splitlines()[-1]))
    rows: Rows = []
    for name in found["cold"][0]:
        medians = (statistics.median(s.get(name, 0.0) for s in found[kind]) for kind in found)
        rows.append((name, *(f"{median:.2f}" for median in medians)))
    return (
        f"Seconds from the command line to the end of the first step, {args.config}, "
        f"medians of {args.rounds}",
        ("", "cold cache", "warm cache"),
        rows,
        [],
    )


def serve_startup(began: str, *arguments: str) -> None:
    """Goes the way of `normlab train` to its first step and prints the seconds of each stage."""
    from normlab import cli  # the front door has it, too, before it starts itself again
    from normlab.environment import entry_environment

    if extra := entry_environment():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **extra})
    clock = time.time
    spent = {"interpreter, twice": clock() - float(began)}
    mark = clock()
    import normlab.training.loop

    spent["import"] = clock() - mark
    inner = [0.0]  # time charged to what the stage at hand has called

    def charged(name: str, function: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            begin = clock()
            inner.append(0.0)
            result = function(*args, **options)
            whole = clock() - begin
            spent[name] = spent.get(name, 0.0) + whole - inner.pop()
            inner[-1] += whole
            return result

        return timed

    for path, name in STAGES.items():
        owner, _, attribute = path.rpartition(".")
        place = pkgutil.resolve_name(owner)
        setattr(place, attribute, charged(name, getattr(place, attribute)))

    def first_step(*parts: Any) -> Any:
        take = take_steps(*parts)

        def step(*args: Any) -> Any:
            charged("first step", lambda: jax.block_until_ready(take(*args)))()
            total = clock() - float(began)
            rest = {"all else": total - sum(spent.values()), "total": total}
            print(json.dumps(spent | rest), flush=True)
            os._exit(0)

        return step

    import jax

    take_steps = normlab.training.parallel.take_steps
    normlab.training.parallel.take_steps = first_step
    sys.exit(cli.main(["train", *arguments]))


# Communication -----------------------------------------------------------------------------------


def communication(args: argparse.Namespace) -> Any:
    """What each normalizer's statistics are to the network, in a step."""
    from normlab.analysis.communication import BACKWARD, FORWARD, GRADIENT, NETWORKS, of_step
    from normlab.config import load_config
    from normlab.norms import NORMS

    networks = [network for network in NETWORKS if network.devices == args.devices]
    names = args.norms.split(",") if args.norms else [n for n in NORMS if NORMS[n].stateful]
    rows: Rows = []
    for name in names:
        volumes = of_step(load_config(f"{args.config},norm={name}"), args.devices)
        statistics_ = volumes[FORWARD] + volumes[BACKWARD]
        gradient = volumes[GRADIENT]
        rows.append(
            (
                name,
                f"{volumes[FORWARD].rounds} + {volumes[BACKWARD].rounds}",
                f"{statistics_.payload / 1e3:,.1f}",
                f"{statistics_.sent / 1e3:,.1f}",
                f"{gradient.sent / 1e6:,.1f}",
                *(f"{1e3 * network.seconds(statistics_):.2f}" for network in networks),
            )
        )
    return (
        f"Communication of a step of {args.config} on {args.devices} devices",
        (
            *("normalizer", "rounds, forward + backward", "kB of its own", "kB sent"),
            "MB sent of gradient",
            *(f"ms, {network.name}" for network in networks),
        ),
        rows,
        [f"{network.name}: {network.source}" for network in networks],
    )


# The command line -------------------------------------------------------------------------------

WORKDIR = (None, "folder to keep, and to use again (a temporary one)")
BENCHMARKS: dict[str, Any] = {
    "devices": (
        devices,
        {
            "--config": ("configs/cifar10.py:model=resnet20", "model and data"),
            "--batch-size": (64, "examples; of the fixed batch a device, on the most devices"),
            "--counts": ("1,2,4,8", "numbers of devices"),
            "--rounds": (7, "turns of each contender"),
            "--clock": ("wall", "wall, or cpu on a busy machine: more threads get more of it"),
        },
    ),
    "sweep": (
        sweep,
        {
            "--runs": ("10,100,1000", "numbers of runs"),
            "--jobs": (2, "workers"),
            "--workdir": WORKDIR,
        },
    ),
    "report": (
        report,
        {
            "--runs": (1000, "runs"),
            "--lines": (1000, "metric lines a run"),
            "--rounds": (3, "times"),
            "--workdir": WORKDIR,
        },
    ),
    "startup": (
        startup,
        {
            "--config": ("configs/digits.py", "what would be trained"),
            "--rounds": (3, "times, each from a cold cache to a warm one"),
        },
    ),
    "communication": (
        communication,
        {
            "--config": ("configs/imagenet.py:model=resnet50", "with choices, of which norm"),
            "--devices": (64, "devices"),
            "--norms": (None, "which normalizers (those with state)"),
        },
    ),
}
SERVERS: dict[str, Any] = {"serve-devices": serve_devices, "serve-startup": serve_startup}


if __name__ == "__main__":
    main()

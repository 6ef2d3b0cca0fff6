"""Measures what scale costs: many devices, many runs, a large report, the start of a run.

    python scripts/bench_scale.py devices     # a step on 1, 2, 4, 8 virtual devices
    python scripts/bench_scale.py sweep       # overhead a run at 10, 100, 1,000 trivial runs
    python scripts/bench_scale.py report      # seconds and memory at 1,000 runs × 1,000 lines
    python scripts/bench_scale.py startup     # from the command line to the first step

Each prints a table, with --markdown one for a page. Whatever is timed runs in processes of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent)]

TRIVIAL = {
    "model.widths": "(4,8)",
    "model.strides": "(2,2)",
    "train.num_steps": "2",
    "data.num_validation": "0",
}
"""A run of which next to nothing is training."""

Rows = list[Sequence[Any]]


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
        server.add_argument("arguments", nargs="*")
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


# Processes and tables ----------------------------------------------------------------------------


def flags(fields: Mapping[str, str]) -> list[str]:
    """Returns the overrides as arguments."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def environment(**extra: str) -> dict[str, str]:
    """Returns this process's environment, with this checkout before any installed normlab."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **extra}


def normlab(arguments: Sequence[str]) -> None:
    """Runs a command of normlab; ends this process if it fails."""
    timed_process(arguments)


def timed_process(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Runs a command of normlab; returns seconds, seconds of a processor, and peak MiB."""
    command = [sys.executable, "-m", "normlab", *arguments]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"normlab {arguments[0]} ended with exit code {code}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


@contextmanager
def folder(chosen: str | None) -> Iterator[Path]:
    """Yields the chosen folder, or one that is gone afterwards."""
    if chosen:
        yield Path(chosen).resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="bench_scale."))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def machine() -> str:
    """Returns machine, versions and commit in a line."""
    from normlab.run import describe_machine

    found = describe_machine()
    commit = (found["git_commit"] or "unknown")[:7] + ("+" if found["git_dirty"] else "")
    load = os.getloadavg()[0]
    return f"{found['cpu']}, jax {found['versions']['jax']}, commit {commit}, load {load:.1f}"


def show(columns: Sequence[str], rows: Rows, markdown: bool) -> None:
    """Prints a table, of plain text or of Markdown."""
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    if markdown:
        lines.insert(1, ["---"] + ["--:"] * (len(columns) - 1))
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        print("  ".join(cells).rstrip())


WORKDIR = (None, "folder to keep, and to use again (a temporary one)")
BENCHMARKS: dict[str, Any] = {
    "report": (
        report,
        {
            "--runs": (1000, "runs"),
            "--lines": (1000, "metric lines a run"),
            "--rounds": (3, "times"),
            "--workdir": WORKDIR,
        },
    ),
}
SERVERS: dict[str, Any] = {}


if __name__ == "__main__":
    main()

"""What the benchmarks of scale share: processes, folders that go away, tables."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout before any installed normlab

Rows = list[Sequence[Any]]


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


def serving(script: Path, *arguments: Any, devices: int) -> subprocess.Popen[str]:
    """Starts a script that answers a line with a line, on so many virtual devices."""
    from normlab.environment import entry_environment

    own = environment(**entry_environment())
    own["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    own["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, *map(str, (script, *arguments))]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=own, stdin=pipe, stdout=pipe, text=True)


def take_turns(servers: Mapping[Any, subprocess.Popen[str]], rounds: int) -> dict[Any, list[float]]:
    """Returns what each server answers, round by round, the first round left out."""
    answers: dict[Any, list[float]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for name, server in servers.items():
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write("go\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            if not answer:
                sys.exit(f"{name} ended with exit code {server.wait()}")
            if number:
                answers[name].append(float(answer))
    for server in servers.values():
        server.communicate()
    return answers

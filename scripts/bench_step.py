"""Times a training step of ResNet-20: normlab, plain Flax, PyTorch (where installed).

    python scripts/bench_step.py [--batch-size 128] [--steps 3] [--rounds 9] [--json FILE]

One process a contender, each in the environment that its own front door gives it: normlab's with
`normlab.environment.entry_environment()`, the others' as they come. The processes take turns, round
by round, so that a slow stretch of the machine meets all of them; the ratios are of medians.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns a contender")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--serve", metavar="CONTENDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.batch_size, args.steps)
        return
    names = ["normlab", "flax"] + (["torch"] if importlib.util.find_spec("torch") else [])
    figures = compare(names, args.batch_size, args.steps, args.rounds)
    print(f"ResNet-20, batch {args.batch_size}, float32; {describe_machine()}")
    for name, seconds in figures.items():
        ratio = statistics.median(seconds) / statistics.median(figures["normlab"])
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(
            f"{name:8} {middle * 1e3:8.1f} ms a step (from {low * 1e3:.1f} to {high * 1e3:.1f}), "
            f"{ratio:.2f} times normlab's"
        )
    if args.json:
        data = {"machine": describe_machine(), "batch_size": args.batch_size, "seconds": figures}
        Path(args.json).write_text(json.dumps(data, indent=2) + "\n")


def compare(names: list[str], batch_size: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Returns seconds a step of each contender's turns, warm-up turn left out."""
    servers = {name: start(name, batch_size, steps) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        for name, server in servers.items():
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write("go\n")
            server.stdin.flush()
            reply = server.stdout.readline()
            if not reply:
                sys.exit(f"{name} ended with exit code {server.wait()}")
            if round_number:
                seconds[name].append(float(reply))
    for server in servers.values():
        server.communicate()
    return seconds


def start(name: str, batch_size: int, steps: int) -> subprocess.Popen[str]:
    """Starts the process of one contender in its own environment."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = f"{HERE.parent}:{environment.get('PYTHONPATH', '')}"
    if name == "normlab":
        from normlab.environment import entry_environment

        environment |= entry_environment()
    command = [sys.executable, __file__, "--serve", name]
    command += ["--batch-size", str(batch_size), "--steps", str(steps)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def serve(name: str, batch_size: int, steps: int) -> None:
    """Takes `steps` steps for each line on stdin and answers with the seconds a step."""
    sys.path.insert(0, str(HERE))
    from bench_networks import CONTENDERS

    step: Any = CONTENDERS[name](batch_size)
    step()
    for _ in sys.stdin:
        step()  # untimed: while others had their turn, the system may have taken the pages away
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        print((time.perf_counter() - begin) / steps, flush=True)


def describe_machine() -> str:
    """Returns cores and versions in a line."""
    versions = []
    for package in ("jax", "flax", "torch"):
        if importlib.util.find_spec(package):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores {platform.machine()}, Python {platform.python_version()}, " + ", ".join(
        versions
    )


if __name__ == "__main__":
    main()

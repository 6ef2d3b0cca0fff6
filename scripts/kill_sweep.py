"""Is anything lost when workers are killed at random? Sweeps 200 trivial runs twice: in peace, and
while something is killed (SIGKILL) every few seconds: a worker, or now and then the sweep itself,
which is then typed again. In the end every run must be done, with the same metrics.jsonl and the
same result, to the byte, clock apart.

    python scripts/kill_sweep.py --workdir=/tmp/kill            # 200 runs
    python scripts/kill_sweep.py --workdir=/tmp/kill --seeds=2  # 8 runs
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

NORMS = "none,batch_norm,layer_norm,batch_renorm"
TRIVIAL = [
    "--config.model.widths=(4,8)",
    "--config.model.strides=(2,2)",
    "--config.train.num_steps=60",
    "--config.log.every_steps=10",
    "--config.eval.every_steps=20",
    "--config.checkpoint.every_steps=15",
]
CLOCK = (
    *("seconds", "compile_seconds", "step_seconds", "examples_per_second"),
    "peak_memory_bytes",
)


def sweep(folder: Path, seeds: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "normlab", "compare", "configs/digits.py", f"--norms={NORMS}"]
    command += [f"--seeds={seeds}", f"--workdir={folder}", *TRIVIAL]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(text) for text in path.read_text().split()] if path.exists() else []
    threads = Path(f"/proc/{pid}/task")
    for thread in threads.iterdir() if threads.exists() else ():
        own += [int(text) for text in (thread / "children").read_text().split()]
    return sorted(set(own))


def disturbed(folder: Path, seeds: int, every: float, draw: random.Random) -> tuple[int, int, int]:
    """Sweeps to the end, killing; returns (killed workers, killed sweeps, commands typed)."""
    workers = sweeps = typed = 0
    while True:
        process, typed = sweep(folder, seeds), typed + 1
        while process.poll() is None:
            time.sleep(draw.uniform(0.5, 1.5) * every)
            victims = children(process.pid)
            if process.poll() is not None or not victims:
                continue
            if draw.random() < 0.1:
                os.kill(process.pid, signal.SIGKILL)
                sweeps += 1
            else:
                os.kill(draw.choice(victims), signal.SIGKILL)
                workers += 1
        if process.returncode == 0:
            return workers, sweeps, typed


def outcomes(folder: Path) -> dict[str, tuple[bytes, dict[str, object]]]:
    """Returns {run id: (metrics.jsonl, result without clock)}."""
    found = {}
    for planned in json.loads((folder / "sweep.json").read_text())["runs"]:
        run = folder / planned["id"]
        result = json.loads((run / "result.json").read_text())
        kept = {name: value for name, value in result.items() if name not in CLOCK}
        found[planned["id"]] = ((run / "metrics.jsonl").read_bytes(), kept)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=50, help="of each of four normalizers (50)")
    parser.add_argument("--every", type=float, default=8.0, help="seconds between kills (8)")
    args = parser.parse_args()
    start = time.monotonic()
    if sweep(args.workdir / "peace", args.seeds).wait():
        return 1
    peace, start = time.monotonic() - start, time.monotonic()
    kills = disturbed(args.workdir / "kills", args.seeds, args.every, random.Random(0))
    war = time.monotonic() - start
    a, b = outcomes(args.workdir / "peace"), outcomes(args.workdir / "kills")
    same = sum(a[run] == b.get(run) for run in a)
    print(f"{len(a)} runs in {peace:.0f} s in peace")
    print("killed: {} workers, {} sweeps; the command was typed {} times".format(*kills), end="")
    print(f"; {war:.0f} s")
    print(f"{same} of {len(a)} runs ended with the same bytes")
    return 0 if same == len(a) == len(b) else 1


if __name__ == "__main__":
    sys.exit(main())

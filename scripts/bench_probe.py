"""Times what `probe.layers` and `probe.signals` cost a run, against the steps between two looks.

    python scripts/bench_probe.py [--config FILE.py:choices] [--rounds 9]

Turns of training steps and of one look at all layers alternate; medians of processor seconds, and
of wall seconds. The images are random: no time depends on what is in them.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

STEPS = 3  # a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/cifar10.py:model=resnet20")
    parser.add_argument("--rounds", type=int, default=9, help="turns of either")
    args = parser.parse_args()

    from normlab.environment import entry_environment

    if extra := entry_environment():  # read before XLA starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **extra})

    from normlab.config import load_config

    config = load_config(args.config, {"probe.layers": ("*",)})
    step, look, between = contenders(config)
    step(), look()  # compiled here
    found: dict[Any, list[tuple[float, float]]] = {step: [], look: []}
    for _ in range(args.rounds):
        found[step].append(timed(lambda: [step() for _ in range(STEPS)]))
        found[look].append(timed(look))
    print(f"{args.config}: {between} steps between two looks")
    for i, clock in enumerate(("processor", "wall")):
        a = statistics.median(seconds[i] for seconds in found[step]) / STEPS
        b = statistics.median(seconds[i] for seconds in found[look])
        print(
            f"{clock:9} {a * 1e3:7.1f} ms a step, {b * 1e3:7.1f} ms a look: "
            f"{100 * b / (a * between):.2f}% of the steps' time"
        )


def timed(work: Any) -> tuple[float, float]:
    """Returns processor and wall seconds."""
    processor, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - wall


def contenders(config: Any) -> tuple[Any, Any, int]:
    """Returns a training step, a look at the layers, and the steps between two looks."""
    from bench_parts import RandomTraining

    from normlab.training.probe import block_paths, layer_metrics

    training = RandomTraining(config)
    parts = training.parts
    config.probe.signals = bool(block_paths(parts.model, parts.info.image_shape))

    def look() -> None:
        where = (config, parts.model, parts.info, training.compiler, training.mesh)
        state = training.state
        layer_metrics(*where, state.variables(), int(state.step) - 1, training.feed)

    return training.step, look, max(parts.length.steps(config.log, "every", "log") or 1, 1)


if __name__ == "__main__":
    main()

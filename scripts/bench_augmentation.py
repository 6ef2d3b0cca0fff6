"""Times what a training batch costs with each kind of augmentation, on the device at hand.

    python scripts/bench_augmentation.py [--batch-size 128] [--size 32] [--rounds 10]

A time is the processor's (all threads) on a CPU, of whatever else runs there as little as can be;
on an accelerator that of the clock. It is the median over the rounds of one batch.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normlab.config import load_config
from normlab.data import DatasetInfo, training_batch

KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "crop and flip": {"crop_padding": 4, "flip": True},
    "MixUp": {"mixup_alpha": 0.2},
    "CutMix": {"cutmix_alpha": 1.0},
    "RandAugment, 1 layer": {"randaugment_layers": 1},
    "RandAugment, 2 layers": {"randaugment_layers": 2},
    "RandAugment, 4 layers": {"randaugment_layers": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="pixels a side, three channels")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{args.batch_size} images of {args.size}×{args.size}×3, {device}, jax {jax.__version__}")
    for name, fields in KINDS.items():
        print(f"{name:22} {1e3 * batch_seconds(fields, args):8.1f} ms")


def batch_seconds(fields: dict[str, Any], args: argparse.Namespace) -> float:
    shape = (args.size, args.size, 3)
    info = DatasetInfo("noise", shape, 10, args.batch_size, 1, (), (0.5,) * 3, (0.25,) * 3)
    images = np.random.default_rng(0).integers(0, 256, (args.batch_size, *shape), dtype=np.uint8)
    examples = jnp.asarray(images), jnp.zeros(args.batch_size, jnp.int32)
    config = load_config("configs/digits.py", {f"data.{k}": v for k, v in fields.items()}).data
    rows = jnp.arange(args.batch_size)
    make = jax.jit(lambda step: training_batch(examples, config, info, 0, step, rows))
    jax.block_until_ready(make(0))
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds = []
    for step in range(args.rounds):
        start = clock()
        jax.block_until_ready(make(step))
        seconds.append(clock() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()

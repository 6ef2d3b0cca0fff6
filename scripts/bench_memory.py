"""Temporaries of a training step as XLA plans them: plain, rematerialized, in microbatches.

    python scripts/bench_memory.py                        # ResNet-20, 64 images of 32×32
    python scripts/bench_memory.py --model=resnet56 --batch=128

Nothing is computed and no data are read.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from normlab.config import load_config
from normlab.training import parallel
from normlab.training.setup import build_parts
from normlab.training.state import initial_state
from normlab.training.step import Batch, make_gradient


def temporaries(model: str, batch: int, **fields: Any) -> int:
    """Returns the bytes of temporaries of one gradient."""
    overrides = {
        "train.batch_size": batch,
        "batch_stats.scope": "ghost",
        "batch_stats.ghost_size": 16,
        **{name.replace("__", "."): value for name, value in fields.items()},
    }
    config = load_config(f"configs/cifar10.py:model={model}", overrides)
    parts = build_parts(config, need_data=False)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    state = jax.eval_shape(functools.partial(initial_state, parts), seed)
    layout, mesh = parallel.make_layout(config), parallel.make_mesh(config)
    gradient = make_gradient(parts.model, microbatches=layout.microbatches)

    def step(params: Any, batch_stats: Any, examples: Batch) -> Any:
        return gradient(params, batch_stats, parallel.lay_out(examples, layout, mesh))

    images = jax.ShapeDtypeStruct((batch, *parts.info.image_shape), jnp.float32)
    examples = Batch(images, jax.ShapeDtypeStruct((batch,), jnp.int32))
    arguments = (state.params, state.batch_stats, examples)
    compiler = parallel.Compiler(parallel.in_order(config))
    plan: Any = compiler("step", step, *arguments).memory_analysis()  # type: ignore[attr-defined]
    return int(plan.temp_size_in_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    ways = {
        "plain": {},
        "train.remat=true": {"train__remat": True},
        "train.microbatches=4": {"train__microbatches": 4},
    }
    for name, fields in ways.items():
        mib = temporaries(args.model, args.batch, **fields) / 2**20
        print(f"{name:22} {mib:8.1f} MiB", flush=True)


if __name__ == "__main__":
    main()

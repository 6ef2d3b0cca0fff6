"""`normlab list`: the names that a config may choose."""

import argparse
from collections.abc import Mapping
from typing import Any

HELP = "list norms, models, optimizers, convolutions or data sets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    kinds = ("norms", "models", "convs", "optimizers", "data")
    parser.add_argument("kind", choices=kinds, help=", ".join(kinds))


def main(args: argparse.Namespace) -> int:
    """Prints a line a name, with the first line of what it is; returns 0."""
    from normlab import models, norms, optim
    from normlab.data.info import DATASETS

    if args.kind == "data":
        for name, info in DATASETS.items():
            shape = "x".join(map(str, info.image_shape))
            print(f"{name:20} {info.num_train} + {info.num_test} images {shape}")
        return 0
    registries: dict[str, Mapping[str, Any]] = {
        "norms": norms.NORMS,
        "models": models.MODELS,
        "convs": models.CONVS,
        "optimizers": optim.OPTIMIZERS,
    }
    width = max(20, *map(len, registries[args.kind]))
    for name, cls in registries[args.kind].items():
        print(f"{name:{width}} {(cls.__doc__ or '').strip().splitlines()[0]}")
    return 0

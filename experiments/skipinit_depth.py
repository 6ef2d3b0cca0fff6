"""De & Smith 2020, "Batch normalization biases residual blocks towards the identity function in
deep networks" (arXiv:2002.10444), table 1.

Wide residual networks n-2 of depth 16 and 100 (and 1000, not here; n-1 of 40 at smoke scale), with
batch normalization, and without, each branch times a learned scalar that starts at 0, at 1/√d for d
blocks (SkipInit), or at 1. Without normalization and with scalars of 1 the signal doubles with each
block, and deep nets do not train.
"""

import math

from normlab.experiment import (
    Experiment,
    Grid,
    Published,
    Scale,
    above,
    all_of,
    close,
    grid,
    settings,
)


def nets(depths: tuple[int, ...], widen_factor: int) -> Grid:
    """Returns the four nets of each depth."""
    found = Grid(())
    for depth in depths:
        blocks = (depth - 4) // 2
        starts = {"a=0": 0.0, "a=1/√d": 1 / math.sqrt(blocks), "a=1": 1.0}
        found += grid({"norm": ["batch_norm"]}, fixed={"model": "wide_resnet"}) * settings(
            {f"depth {depth}": {"model.depth": depth, "model.widen_factor": widen_factor}}
        )
        found += grid({"norm": ["none"]}, fixed={"model": "skipinit_resnet"}) * settings(
            {
                f"depth {depth}, {name}": {
                    "model.depth": depth,
                    "model.widen_factor": widen_factor,
                    "model.skip_gain": start,
                }
                for name, start in starts.items()
            }
        )
    return found


def verdict(deep: int):
    """Returns: at depth `deep` SkipInit trains, far better than a scalar of 1, near batch norm."""
    batch_norm, zero, root, one = (
        ("batch_norm", f"depth {deep}"),
        *(("none", f"depth {deep}, {name}") for name in ("a=0", "a=1/√d", "a=1")),
    )
    return all_of(
        above(zero, one, margin=10.0),
        above(root, one, margin=10.0),
        close(zero, batch_norm, margin=3.0),
    )


RECIPE = {
    "train.batch_size": 128,
    "optim.schedule": "piecewise",
    "optim.weight_decay": 5e-4,
}

EXPERIMENT = Experiment(
    claim=(
        "Deep residual networks train without normalization if each branch starts at or near zero, "
        "and do not if it starts at one."
    ),
    paper=Published(
        metric="test_accuracy",
        rows={
            "batch_norm": {"depth 16": 93.5, "depth 100": 95.4},
            "none": {
                "depth 16, a=0": 93.3,
                "depth 100, a=0": 94.2,
                "depth 16, a=1/√d": 93.0,
                "depth 100, a=1/√d": 94.2,
            },
        },
        setting="CIFAR-10, n-2 wide residual networks, batch 128, 200 epochs; best learning rate",
        source="table 1",
        sure="remembered, not checked in the paper; with a=1 depth 16 trains and 100 does not",
    ),
    scales={
        "smoke": Scale(
            "configs/digits.py",
            {**RECIPE, "train.batch_size": 64, "train.num_epochs": 3.0},
            sweep=nets((16, 40), widen_factor=1),
            verdict=verdict(40),
            cost="8 minutes on 2 cores",
        ),
        "cifar": Scale(
            "configs/cifar10.py",
            {
                **RECIPE,
                "train.num_epochs": 200.0,
                "optim.milestones_fraction": (0.3, 0.6, 0.8),
                "optim.decay_factor": 0.2,
            },
            cost="a GPU; a day a run of depth 100 on 2 cores",
        ),
    },
    sweep=nets((16, 100), widen_factor=2),
    seeds=3,
    verdict=verdict(100),
)

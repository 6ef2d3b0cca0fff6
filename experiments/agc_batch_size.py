"""Brock, De, Smith & Simonyan 2021, "High-performance large-scale image recognition without
normalization" (arXiv:2102.06171), figure 2 (a).

A normalizer-free ResNet with and without adaptive gradient clipping, at batch sizes with the
learning rate scaled along, 0.1·B/256. The paper draws the result and prints no number: without
clipping the accuracy falls off at large batches, with it (λ = 0.01) it holds.
"""

from normlab.experiment import (
    Experiment,
    Grid,
    Published,
    Row,
    Scale,
    above,
    all_of,
    close,
    grid,
    settings,
)

STEPS = "steps until a loss or gradient is no longer finite, or the run's end"


def sound_steps(row: Row) -> float | None:
    """Returns the steps before the streak of non-finite ones that ended the run; else all."""
    diverged = row.number("diverged_step")
    return row.number("steps") if diverged is None else diverged - 1


def batches(sizes: tuple[int, ...], clipping: float) -> Grid:
    """Returns, of each batch size, a setting without and one with clipping."""
    return settings(
        {
            f"B={size}{', AGC' * clipped}": {
                "train.batch_size": size,
                "optim.agc_clipping": clipping if clipped else None,
            }
            for size in sizes
            for clipped in (False, True)
        }
    )


def verdict(sizes: tuple[int, ...]):
    """Returns: of the smallest batch clipping changes little, of the largest it decides."""
    small, large = (f"B={size}" for size in (sizes[0], sizes[-1]))
    return all_of(
        close(("none", f"{small}, AGC"), ("none", small), margin=2.0),
        above(("none", f"{large}, AGC"), ("none", large)),
    )


RECIPE = {
    "optim.base_lr": 0.1,
    "optim.reference_batch_size": 256,
    "optim.nesterov": True,
    "optim.schedule": "cosine",
    "optim.weight_decay": 5e-5,
    "optim.warmup_epochs": 5.0,
}
NET = grid({"norm": ["none"]}, fixed={"model": "nf_resnet20"})
SMOKE, CIFAR = (64, 1024), (256, 512, 1024, 2048, 4096)

EXPERIMENT = Experiment(
    claim=(
        "With the learning rate scaled with the batch, adaptive gradient clipping lets a "
        "normalizer-free ResNet train at batch sizes where it fails without, and changes little "
        "at small ones."
    ),
    paper=Published(
        metric="test_accuracy",
        rows={},
        setting="ImageNet, NF-ResNet-50 and -200, batch 256 to 4096, 90 epochs; best 4 of 5 runs",
        source="figure 2 (a)",
        sure="a figure only: no number is printed in the paper",
    ),
    scales={
        "smoke": Scale(
            "configs/digits.py",
            {
                **RECIPE,
                "model.stage_sizes": (1, 1, 1),
                "model.width": 8,
                "train.num_epochs": 20.0,
                "optim.base_lr": 0.4,
            },
            sweep=NET * batches(SMOKE, 0.01),
            verdict=verdict(SMOKE),
            cost="3 minutes on 2 cores",
        ),
        "cifar": Scale(
            "configs/cifar10.py",
            {**RECIPE, "train.num_epochs": 90.0},
            cost="a GPU; 8 hours a run on 2 cores",
        ),
    },
    sweep=NET * batches(CIFAR, 0.01),
    seeds=3,
    verdict=verdict(CIFAR),
    quantities={STEPS: sound_steps},
)

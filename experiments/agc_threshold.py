"""Brock, De, Smith & Simonyan 2021 (arXiv:2102.06171), figure 2 (b): λ against batch size.

Which threshold of adaptive gradient clipping, λ from 0.01 to 0.16, suits which batch size, the
learning rate scaled along: small batches stand a large λ, large ones need a small. Numbers are in
a figure only.

The hypothesis on the smallest batch, that all λ do alike there, was declared before any run. In
short runs it is contradicted in the direction of the claim: a small λ holds back a small batch.
"""

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

THRESHOLDS = (0.01, 0.02, 0.04, 0.08, 0.16)


def thresholds(sizes: tuple[int, ...], clippings: tuple[float, ...]) -> Grid:
    """Returns a setting of each batch size and threshold."""
    return settings(
        {
            f"B={size}, λ={clipping}": {
                "train.batch_size": size,
                "optim.agc_clipping": clipping,
            }
            for size in sizes
            for clipping in clippings
        }
    )


def verdict(sizes: tuple[int, ...], clippings: tuple[float, ...]):
    """Returns: the smallest λ is better at the largest batch, and costs little at the smallest."""
    small, large = (f"B={size}" for size in (sizes[0], sizes[-1]))
    low, high = (f"λ={clipping}" for clipping in (clippings[0], clippings[-1]))
    return all_of(
        above(("none", f"{large}, {low}"), ("none", f"{large}, {high}")),
        close(("none", f"{small}, {low}"), ("none", f"{small}, {high}"), margin=2.0),
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
SMOKE, CIFAR = ((64, 1024), (0.01, 0.04, 0.16)), ((256, 1024, 4096), THRESHOLDS)

EXPERIMENT = Experiment(
    claim="The larger the batch, the smaller the threshold that adaptive gradient clipping needs.",
    paper=Published(
        metric="test_accuracy",
        rows={},
        setting="ImageNet, NF-ResNet-50, batch 256 to 4096, λ from 0.01 to 0.16, 90 epochs",
        source="figure 2 (b)",
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
            sweep=NET * thresholds(*SMOKE),
            verdict=verdict(*SMOKE),
            cost="4 minutes on 2 cores",
        ),
        "cifar": Scale(
            "configs/cifar10.py",
            {**RECIPE, "train.num_epochs": 90.0},
            cost="a GPU; 8 hours a run on 2 cores",
        ),
    },
    sweep=NET * thresholds(*CIFAR),
    seeds=3,
    verdict=verdict(*CIFAR),
)

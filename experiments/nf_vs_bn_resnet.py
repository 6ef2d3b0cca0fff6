"""Brock, De & Smith 2021, "Characterizing signal propagation to close the performance gap in
unnormalized ResNets" (arXiv:2101.08692), tables 1 and 2.

Normalizer-free ResNets against pre-activation ResNets with batch normalization: the same blocks,
`preact_resnet20` and `nf_resnet20`, which differ in the normalizer and what takes its place (scaled
weight standardization, α, β, skip gains). With statistics of 4 images at a time batch normalization
falls behind, and the normalizer-free net, which has no statistics, is the very same runs. (The
paper trains with batches of 4; here the batch, and so the noise of the gradient, stays as it is.)

The nets of 32×32 images have neither dropout nor stochastic depth, as the paper's first column.
"""

from normlab.experiment import (
    Experiment,
    Published,
    Scale,
    above,
    all_of,
    close,
    grid,
    settings,
)

NETS = grid({"norm": ["batch_norm"]}, fixed={"model": "preact_resnet20"}) + grid(
    {"norm": ["none"]}, fixed={"model": "nf_resnet20"}
)
WHOLE = settings({"whole batch": {"batch_stats.scope": "global"}})
GROUPS = WHOLE + settings(
    {"groups of 4": {"batch_stats.scope": "ghost", "batch_stats.ghost_size": 4}}
)

RECIPE = {
    "train.batch_size": 128,
    "optim.nesterov": True,
    "optim.schedule": "cosine",
    "optim.weight_decay": 5e-5,
    "optim.decay_roles": ("kernel",),
}

EXPERIMENT = Experiment(
    claim=(
        "A normalizer-free ResNet trains as well as one with batch normalization, and better than "
        "one whose statistics are of four images."
    ),
    paper=(
        Published(
            metric="test_accuracy",
            rows={"batch_norm": {"whole batch": 76.8}, "none": {"whole batch": 75.8}},
            setting="ImageNet, ResNet-50, batch 1024, 90 epochs, without further regularization",
            source="table 1",
            sure="remembered; see Brock et al. 2021a",
        ),
        Published(
            metric="test_accuracy",
            rows={"batch_norm": {"groups of 4": 55.7}, "none": {"groups of 4": 69.9}},
            setting="ImageNet, ResNet-50, batch 4, 15 epochs",
            source="table 2",
            sure="seen in a secondary source",
        ),
    ),
    scales={
        "smoke": Scale(
            "configs/digits.py",
            {
                **RECIPE,
                "model.stage_sizes": (1, 1, 1),
                "model.width": 8,
                "train.batch_size": 64,
                "train.num_epochs": 10.0,
            },
            cost="3 minutes on 2 cores",
        ),
        "cpu": Scale(
            "configs/cifar10.py",
            {**RECIPE, "train.num_epochs": 2.0, "eval.every_epochs": 0.25},
            sweep=NETS * WHOLE,
            verdict=all_of(
                above("none", 50.0),
                close("none", "batch_norm", margin=10.0),
            ),
            claim=(
                "In two epochs a normalizer-free ResNet-20 trains stably to far above chance, "
                "within ten points of one with batch normalization."
            ),
            cost="45 minutes on 2 cores",
        ),
        "cifar": Scale(
            "configs/cifar10.py",
            {**RECIPE, "train.num_epochs": 164.0},
            cost="a GPU; 15 hours a run on 2 cores",
        ),
    },
    sweep=NETS * GROUPS,
    seeds=3,
    verdict=all_of(
        close(("none", "whole batch"), ("batch_norm", "whole batch"), margin=1.5),
        above(("none", "groups of 4"), ("batch_norm", "groups of 4")),
        above(("batch_norm", "whole batch"), ("batch_norm", "groups of 4")),
    ),
)

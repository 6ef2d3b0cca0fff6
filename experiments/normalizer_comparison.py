"""Normalizers side by side. Chiley et al. 2019, "Online Normalization" (arXiv:1905.05894).

The numbers are the medians of the authors' published logs (github.com/Cerebras/online-normalization
as of 2019): CIFAR-10 with ResNet-20, and Fashion-MNIST with a multilayer perceptron. Where the
recipe leaves something open, it is said beside the field.
"""

from normlab.experiment import Experiment, Measured, Published, Scale, above, all_of, close, grid

CIFAR_RECIPE = {
    "train.batch_size": 128,
    "train.num_epochs": 250.0,
    "optim.base_lr": 0.1,
    "optim.schedule": "piecewise",
    "optim.milestones_epochs": (100.0, 150.0, 200.0),
    "optim.decay_factor": 0.1,
    "optim.weight_decay": 2e-4,
    "norm.num_groups": 8,
}

FASHION_RECIPE = {
    "model.widths": (500, 300),  # three layers, the head among them; widths assumed
    "model.activation": "relu",  # not stated
    "train.batch_size": 32,
    "train.num_epochs": 10.0,
    "optim.base_lr": 0.04,
    "optim.schedule": "constant",  # no decay is stated
    "optim.momentum": 0.0,  # none is stated
    "optim.weight_decay": 1e-4,
}

NORMS = grid({"norm": ["batch_norm", "instance_norm", "group_norm", "layer_norm"]})

ORDER = all_of(
    above("batch_norm", "instance_norm"),
    above("batch_norm", "group_norm"),
    above("instance_norm", "layer_norm"),
    above("group_norm", "layer_norm"),
    close("instance_norm", "group_norm", margin=1.0),
)

EXPERIMENT = Experiment(
    claim=(
        "In a convolutional network on images BatchNorm is best, InstanceNorm and GroupNorm follow "
        "together, LayerNorm is last."
    ),
    paper=(
        Published(
            metric="test_accuracy",
            rows={
                "batch_norm": Measured(92.2, std=0.22, n=5),
                "instance_norm": Measured(90.4, n=1),
                "group_norm": Measured(90.3, n=1),
                "layer_norm": Measured(87.4, n=1),
            },
            setting="CIFAR-10, ResNet-20, batch 128, 250 epochs; median, best epoch",
            source="Chiley et al. 2019, logs",
            sure="read in the logs; best epoch on the test set flatters by some tenths of a point",
            scales=("cifar",),
        ),
        Published(
            metric="test_accuracy",
            rows={
                "batch_norm": Measured(88.8, std=0.58, n=400),
                "layer_norm": Measured(88.3, std=0.60, n=400),
                "none": Measured(88.2, std=0.52, n=400),
            },
            setting="Fashion-MNIST, 3-layer perceptron, batch 32, 10 epochs; median, best epoch",
            source="Chiley et al. 2019, logs",
            sure="read in the logs; our widths, activation, momentum and schedule are assumed",
            scales=("cpu",),
        ),
    ),
    scales={
        "smoke": Scale("configs/digits.py", {"norm.num_groups": 8}, cost="1 minute on 2 cores"),
        "cpu": Scale(
            "configs/fashion_mnist.py:model=mlp",
            FASHION_RECIPE,
            sweep=grid({"norm": ["batch_norm", "layer_norm", "none"]}),
            seeds=20,
            verdict=all_of(above("batch_norm", "layer_norm"), above("batch_norm", "none")),
            cost="20 minutes on 2 cores",
            claim=(
                "In a small perceptron BatchNorm is ahead of LayerNorm and of no normalizer (in "
                "the logs by half a point, one standard deviation of a run)."
            ),
        ),
        "cifar": Scale("configs/cifar10.py", CIFAR_RECIPE, cost="a GPU; 9 hours a run on 2 cores"),
    },
    sweep=NORMS,
    seeds=3,
    verdict=ORDER,
)

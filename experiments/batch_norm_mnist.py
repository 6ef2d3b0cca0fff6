"""Ioffe & Szegedy 2015, "Batch Normalization" (arXiv:1502.03167), section 4.1 and figure 1.

A perceptron of three layers of 100 sigmoids on binary MNIST images, batch 60, 50,000 steps, with
and without batch normalization: test accuracy against steps (a), and the 15th, 50th and 85th
percentiles of the input of one unit of the last hidden layer over training (b, c).

The paper states neither learning rate nor optimizer nor final accuracies. Here: plain gradient
descent at 0.1, and weights from N(0, 1/fan-in), "small random Gaussian values" in the paper.
"""

from normlab.experiment import Experiment, Published, Row, Scale, above, all_of, grid

RECIPE = {
    "data.binarize": True,
    "train.batch_size": 60,
    "optim.base_lr": 0.1,
    "optim.schedule": "constant",
    "optim.momentum": 0.0,
    "probe.layer": "norm3",
    "eval.every_fraction": 0.02,
    "log.every_fraction": 0.02,
}


def drift(row: Row) -> float | None:
    """Returns how far the median wandered over training, in widths of the final band.

    (max − min of the 50th percentile) / (85th − 15th percentile at the end).
    """
    if not {"p15", "p50", "p85"} <= row.probe.keys():
        return None
    medians = [value for _, value in row.probe["p50"]]
    width = row.probe["p85"][-1][1] - row.probe["p15"][-1][1]
    return (max(medians) - min(medians)) / width if width > 0 else None


def early(row: Row) -> float | None:
    """Returns the mean test accuracy over all evaluations, in percent: higher is faster."""
    return 100 * sum(value for _, value in row.curve) / len(row.curve) if row.curve else None


EXPERIMENT = Experiment(
    claim=(
        "Batch normalization makes a sigmoid network learn faster and better, and the inputs of "
        "its units stable over training."
    ),
    paper=Published(
        metric="test_accuracy",
        rows={},
        setting="MNIST, binary, 3×100 sigmoid, batch 60, 50,000 steps",
        source="figure 1",
        sure="a figure only: no number is printed in the paper",
        scales=("cpu",),
    ),
    scales={
        "smoke": Scale(
            "configs/digits.py:model=mlp",
            {**RECIPE, "train.num_steps": 1000},
            cost="20 seconds on 2 cores",
        ),
        "cpu": Scale(
            "configs/mnist.py:model=mlp",
            {**RECIPE, "train.num_steps": 50_000},
            seeds=5,
            cost="10 minutes on 2 cores",
        ),
    },
    sweep=grid({"norm": ["none", "batch_norm"]}),
    seeds=3,
    verdict=all_of(
        above("batch_norm", "none"),
        above("batch_norm", "none", measure=early, what="accuracy averaged over training"),
        above(
            "none",
            "batch_norm",
            measure=drift,
            what="drift of the unit's median input",
            unit="band widths",
        ),
    ),
)

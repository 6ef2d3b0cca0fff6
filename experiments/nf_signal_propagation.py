"""Brock, De & Smith 2021 (arXiv:2101.08692), figures 1 and 2: signal propagation at the start.

Along the residual stream of a pre-activation network, block by block: with batch normalization on
the branches its second moment grows by the branch's, which is 1; without normalization and with
He's weights it doubles; in a normalizer-free network with α = 0.2 it grows by α² = 0.04, with
branches of variance 1. (De & Smith 2020, arXiv:2002.10444, say the first two.)

Measured on each run's network as it starts (`normlab probe signals`: Gaussian images, one stage of
eight blocks, skip gains of 1), so a run trains one step and its accuracy says nothing. The images
go on at their other side (`conv.boundary`): padding by zeros takes off what the border lacks, and
docs/probes.md has how much.

The design was changed after runs had been seen: at first 64 channels, padding by zeros and margins
of 35% (reproduced, without a hypothesis on α²); then this one with five seeds (underpowered), and
with the ten that its estimate of power led to.
"""

import functools
from collections.abc import Callable

from normlab.experiment import (
    Experiment,
    Hypothesis,
    Published,
    Row,
    Scale,
    all_of,
    close,
    grid,
    settings,
)

Measure = Callable[[Row], float | None]

ADDED = "second moment of the stream, added a block"
FACTOR = "second moment of the stream, factor a block"
BRANCH = "variance at the end of a branch"


@functools.cache
def _signals(config: str) -> dict[str, list[float]]:
    """Returns {column: value of each block} of the network as it starts."""
    import json

    from normlab.analysis.signals import measure_signals
    from normlab.analysis.subject import fresh
    from normlab.config import from_json

    values = measure_signals(fresh(from_json(json.loads(config)), num_seeds=1)).values
    return {name: list(of_seeds[0]) for name, of_seeds in values.items()}


def signals(row: Row) -> dict[str, list[float]]:
    """Returns {column: value of each block} of the run's network as it starts."""
    import json

    return _signals(json.dumps(row.config))


def stream(row: Row) -> list[float]:
    """Returns the second moment of the stream behind each block."""
    found = signals(row)
    return [sum(pair) for pair in zip(found["mean_squared"], found["variance"], strict=True)]


def added(row: Row) -> float | None:
    """Returns by how much the second moment grows from block to block, on average."""
    moments = stream(row)
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def factor(row: Row) -> float | None:
    """Returns the factor by which the second moment grows a block, as a geometric mean."""
    moments = stream(row)
    return (moments[-1] / moments[0]) ** (1 / (len(moments) - 1))


def branch(row: Row) -> float | None:
    """Returns the mean over blocks of the variance at the end of the branch."""
    values = signals(row)["branch_variance"]
    return sum(values) / len(values)


NETS = (
    grid({"norm": ["batch_norm"]}, fixed={"model": "preact_resnet20"})
    * settings({"batch normalization": {}})
    + grid({"norm": ["none"]}, fixed={"model": "preact_resnet20"}) * settings({"neither": {}})
    + grid({"norm": ["none"]}, fixed={"model": "nf_resnet20"})
    * settings({"normalizer-free": {"model.skip_gain": 1.0}})
)
FIELDS = {
    "model.stage_sizes": (8,),
    "model.width": 128,
    "conv.boundary": "circular",
    "train.batch_size": 64,
    "train.num_steps": 1,
    "optim.base_lr": 1e-6,
}
BN, NEITHER, FREE = (
    ("batch_norm", "batch normalization"),
    ("none", "neither"),
    ("none", "normalizer-free"),
)


def near(place: tuple[str, str], what: str, measure: Measure, number: float) -> Hypothesis:
    """Returns the hypothesis that a quantity is within a tenth of theory's number."""
    return close(place, number, margin=number / 10, measure=measure, what=what, unit="")


def theory(metric: str, rows: dict) -> Published:
    """Returns theory's numbers for one quantity."""
    return Published(
        metric=metric,
        rows=rows,
        setting="wide networks on Gaussian images, without a border",
        source="sections 3 and 4; De & Smith 2020",
        sure="derived",
    )


EXPERIMENT = Experiment(
    claim=(
        "At the start the residual stream grows by one a block with batch normalization, doubles "
        "without, and grows by α² in a normalizer-free network, whose branches have variance 1."
    ),
    paper=(
        theory(ADDED, {"batch_norm": {BN[1]: 1.0}, "none": {FREE[1]: 0.04}}),
        theory(FACTOR, {"none": {NEITHER[1]: 2.0}}),
        theory(BRANCH, {"none": {FREE[1]: 1.0}}),
    ),
    scales={"smoke": Scale("configs/digits.py", FIELDS, cost="8 minutes on 2 cores")},
    sweep=NETS,
    seeds=10,
    verdict=all_of(
        near(BN, ADDED, added, 1.0),
        near(NEITHER, FACTOR, factor, 2.0),
        near(FREE, ADDED, added, 0.04),
        near(FREE, BRANCH, branch, 1.0),
    ),
    quantities={ADDED: added, FACTOR: factor, BRANCH: branch},
)

"""Yang, Pennington, Rao, Sohl-Dickstein & Schoenholz 2019, "A mean field theory of batch
normalization" (arXiv:1902.08129).

In a deep perceptron with batch normalization and without shortcuts gradients explode with depth at
the start, whatever the activation: the *squared* norm grows from layer to layer, towards the input,
by (B − 2)/(B − 3) in a linear net with batches of B, and in the limit of large batches by
E[φ'²]/Var φ, π/(π − 1) = 1.467 with ReLU. (The norm grows by the root, 1.211 with ReLU.)

The growth is measured on each run's network as it starts (`normlab probe gradients`: 24 layers of
512 units, Gaussian images, cross entropy, geometric mean over the layers), so a run trains one step
and its accuracy says nothing.
"""

import functools

from normlab.experiment import (
    Experiment,
    Grid,
    Hypothesis,
    Published,
    Row,
    Scale,
    all_of,
    close,
    grid,
    settings,
)

GROWTH = "growth of the squared gradient norm a layer"

THEORY = {
    "identity, B=8": 6 / 5,
    "identity, B=16": 14 / 13,
    "identity, B=32": 30 / 29,
    "relu, B=256": 1.4669,
    "tanh, B=256": 1.178,
    "silu, B=256": 1.212,
    "gelu, B=256": 1.319,
}
"""Exact for the linear net; of other activations the limit of large batches."""

SMALL_BATCHES = tuple(f"relu, B={size}" for size in (8, 16, 32, 64))
"""Far from the limit; measured, with no number of theory's to compare with."""


@functools.cache
def _growth(config: str) -> float | None:
    import json

    from normlab.analysis.gradients import measure_gradients
    from normlab.analysis.subject import fresh
    from normlab.config import from_json

    found = measure_gradients(fresh(from_json(json.loads(config)), num_seeds=1))
    return found.summary["growth of the squared norm a place"]


def growth(row: Row) -> float | None:
    """Returns the growth a layer, as a mean of logarithms, in the run's network as it starts."""
    import json

    return _growth(json.dumps(row.config)) if row.config else None


def cells(names: tuple[str, ...]) -> Grid:
    """Returns a setting for each "activation, B=size"."""
    found = {}
    for name in names:
        activation, _, size = name.partition(", B=")
        found[name] = {"model.activation": activation, "train.batch_size": int(size)}
    return settings(found)


def near(part: float) -> list[Hypothesis]:
    """Returns the hypotheses that the growth is within a part of theory's numbers."""
    return [
        close(
            ("batch_norm", name),
            number,
            margin=round(part * number, 3),
            measure=growth,
            what=GROWTH,
            unit="",
        )
        for name, number in THEORY.items()
    ]


NET = grid({"norm": ["batch_norm"]}, fixed={"model": "deep_mlp"})
ONE_STEP = {"train.num_steps": 1, "optim.base_lr": 1e-6, "model.weights": "lecun"}

EXPERIMENT = Experiment(
    claim=(
        "With batch normalization and without shortcuts gradients explode with depth, for every "
        "activation, by the factors of mean field theory."
    ),
    paper=Published(
        metric=GROWTH,
        rows={"batch_norm": THEORY},
        setting="infinitely wide networks; other activations than the identity: large batches",
        source="mean field theory, by quadrature",
        sure="computed (`normlab.analysis.mean_field`); for relu as in the paper",
        scales=("smoke",),
    ),
    scales={
        "smoke": Scale(
            "configs/digits.py",
            {**ONE_STEP, "model.depth": 24, "model.width": 512},
            cost="5 minutes on 2 cores",
        ),
    },
    sweep=NET * cells((*THEORY, *SMALL_BATCHES)),
    seeds=5,
    verdict=all_of(*near(part=0.03)),
    quantities={GROWTH: growth},
)

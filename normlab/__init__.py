"""normlab: a JAX/Flax laboratory for normalization experiments.

    config = normlab.load_config("configs/digits.py:norm=layer_norm", {"train.num_epochs": 2})
    model = normlab.models.build(config)
    metrics = normlab.train(config, "runs/layer_norm")

Importing it is light: each name loads what it needs when it is first touched.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = ("analysis", "config", "data", "models", "norms", "optim", "report", "training")
_FUNCTIONS = {"load_config": "normlab.config", "train": "normlab.training.loop"}

__all__ = ["__version__", "load_config", "train", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"normlab.{name}")
    raise AttributeError(f"module 'normlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

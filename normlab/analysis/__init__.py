"""What a trained or fresh network is like: probes and transformations that change no run."""

import importlib
from typing import Any

_FUNCTIONS = {
    "fold": "normlab.analysis.folding",
    "without_norm": "normlab.analysis.folding",
    "calibrate": "normlab.analysis.calibration",
    "measure_signals": "normlab.analysis.signals",
    "measure_gradients": "normlab.analysis.gradients",
}

__all__ = ["calibrate", "fold", "measure_gradients", "measure_signals", "without_norm"]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'normlab.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

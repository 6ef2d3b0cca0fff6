"""Calibration: statistics of a data set at fixed weights, in place of moving averages.

One pass over the training set at the weights of any checkpoint, its batches' moments merged by the
law of total variance: exact, unlike a mean of variances, which misses how far the batches' means
lie apart (as PreciseBN, Wu & Johnson 2021, arXiv:2105.07576). Moving averages lag behind weights
that move fast, and averaged weights (`train.ema_decay`) never had the averaged statistics.
"""

from pathlib import Path
from typing import Any

from normlab import run
from normlab.errors import UserError
from normlab.training import snapshot
from normlab.training.restore import Opened, open_run


def calibrate(
    folder: Path,
    *,
    num_batches: int | None = None,
    workdir: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Returns test metrics with running, batch and recomputed statistics of a run's checkpoint.

    `num_batches` of training batches are drawn in one fixed shuffle; None: every example, once.
    With `workdir`, a new folder, the calibrated checkpoint is written there, for `normlab eval`;
    the run is never changed. `settings` as of `restore.open_run`. Raises UserError as it does, for
    a normalizer without state, and for a `workdir` that exists.
    """
    if num_batches is not None and num_batches < 1:
        raise UserError(f"--batches={num_batches} must be 1 or more")
    if workdir is not None:
        snapshot.check_new(workdir)
    there = open_run(folder, **settings)
    parts, made, data = there.parts, there.evaluator, there.data
    if not parts.norm.stateful:
        raise UserError(f"norm {parts.config.norm.kind!r} has no statistics to calibrate")
    size = parts.length.batch_size
    exact = made.recompute(there.variables, data.train, size, num_batches=num_batches)
    test, used = data.evaluated["test"], len(data.train)
    ways = {
        "running": made.running(there.variables, test, parts.config.eval.batch_size),
        "batch": made.batch(there.variables, test, size),
        "recomputed": made.running(exact, test, parts.config.eval.batch_size),
    }
    metrics: dict[str, Any] = {
        "step": there.step,
        "weights": "ema" if there.use_ema else "raw",
        "examples": used if num_batches is None else min(num_batches * size, used),
    }
    for way, found in ways.items():
        metrics |= {f"test_{name}_{way}_statistics": value for name, value in found.items()}
    if workdir is not None:
        _write(workdir, folder, there, exact, metrics)
    return metrics


def _write(
    workdir: Path, folder: Path, there: Opened, exact: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """Writes what `normlab eval` reads of a run, with the statistics of the weights measured."""
    calibrated = there.state
    if there.use_ema:
        calibrated = calibrated.replace(ema=exact)
    else:
        calibrated = calibrated.replace(batch_stats=exact["batch_stats"])
    config = dict(run.read_json(folder / "config.json") or {})
    config["eval"] = {**config["eval"], "use_ema": there.use_ema}  # the weights it is made for
    origin = {"of": str(folder.resolve()), **metrics}
    manifest = {**(run.read_json(folder / "manifest.json") or {}), "calibrated": origin}
    snapshot.write(workdir, calibrated, config=config, manifest=manifest)

"""Fabricated run folders: the formats are real, every number is made up by a formula below."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "lr x5": {"optim.base_lr": 0.5},
    "ghost 1": {"batch_stats.scope": "ghost", "batch_stats.ghost_size": 1},
}
NORMS = ("none", "batch_norm", "layer_norm", "group_norm", "instance_norm", "batch_renorm")
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
STATEFUL = ("batch_norm", "batch_renorm")


def made_up_accuracy(setting: str, norm: str, seed: int) -> float:
    """A final test accuracy with the pattern that the papers tell of."""
    wobble = 0.004 * math.sin(7 * seed + len(norm))
    if setting == "lr x5" and norm == "none":
        return 0.1
    if setting == "ghost 1" and norm in STATEFUL:
        return 0.35 + 40 * wobble
    return 0.982 + 0.001 * NORMS.index(norm) + wobble if norm in NORMS else 0.9 + wobble


def write_run(
    folder: Path,
    *,
    norm: str = "batch_norm",
    seed: int = 0,
    accuracy: float | None = 0.9,
    state: str = "done",
    message: str = "",
    overrides: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    num_lines: int = 15,
    step_seconds: float | None = None,
) -> Path:
    """Writes one run folder; its test accuracy rises from chance (0.1) to `accuracy`.

    `step_seconds` are those of timing.jsonl, which is not written without.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "schema_version": 1,
        "source": f"configs/digits.py:norm={norm}",
        "seed": seed,
        "norm": {"kind": norm},
        "model": {"kind": "cnn"},
        "optim": {"kind": "sgd", "base_lr": 0.1},
        "batch_stats": {"scope": "global", "ghost_size": None},
        "data": {"name": "digits", "source": "sklearn", "path": None},
    }
    for name, value in (overrides or {}).items():
        section, _, key = name.partition(".")
        config[section][key] = value
    steps = [22 * (line + 1) for line in range(num_lines)]
    lines = []
    for index, step in enumerate(steps):
        final = 0.1 if accuracy is None else accuracy
        reached = 0.1 + (final - 0.1) * (1 - math.exp(-(index + 1) / 2.5))
        reached += 0.02 * math.sin(5 * seed + 3 * index) * math.exp(-index / 4)
        reached = final if index == num_lines - 1 else max(reached, 0.0)
        lines.append({"step": step, "split": "train", "loss": 1 / step, "nonfinite": 0})
        lines.append({"step": step, "split": "test", "accuracy": reached, "loss": 2 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if step_seconds is not None:
        times = [
            {"step": line["step"], "seconds": 9.0, "train_seconds": line["step"] * step_seconds}
            for line in lines
        ]
        (folder / "timing.jsonl").write_text("".join(json.dumps(time) + "\n" for time in times))
    files: dict[str, Any] = {
        "config": config,
        "manifest": {
            "schema_version": 1,
            "id": folder.name,
            "git_commit": "0" * 40,
            "git_dirty": False,
            "python": "3.11.2",
            "versions": {"jax": "0.10.2", "flax": "0.12.8"},
            "devices": ["cpu"],
            "threads": 1,
            "data_fingerprint": "made up",
            "data_order_hash": f"order {seed}",
            **(manifest or {}),
        },
        "status": {"status": state, "step": steps[-1], "message": message},
    }
    if state in ("done", "diverged"):
        files["result"] = {
            "test_accuracy": accuracy,
            "test_loss": 0.1,
            "train_loss": 0.05,
            "steps": steps[-1],
            "seconds": 2.5 + 0.1 * seed,
            "compile_seconds": 1.5,
            "examples_per_second": 9000.0,
            "step_seconds": 0.0061 + 0.0001 * seed,
            "num_params": 28_170,
        }
        if norm in STATEFUL and accuracy is not None:
            files["result"]["test_accuracy_batch_statistics"] = min(accuracy + 0.002, 1.0)
            files["result"]["test_accuracy_recomputed_statistics"] = min(accuracy + 0.001, 1.0)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_sweep(
    directory: Path,
    *,
    settings: Mapping[str, Mapping[str, Any]] = SETTINGS,
    norms: tuple[str, ...] = NORMS,
    seeds: tuple[int, ...] = (0, 1, 2),
    run: Callable[[str, str, int], Mapping[str, Any] | None] = lambda setting, norm, seed: {},
) -> Path:
    """Writes a sweep in which stateless normalizers share the runs of `ghost 1` with `base`.

    `run(setting, norm, seed)` gives further arguments of `write_run`; None leaves the run planned.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries = []
    for setting, overrides in settings.items():
        for norm in norms:
            for seed in seeds:
                shares = setting == "ghost 1" and norm not in STATEFUL and "base" in settings
                what = f"{'base' if shares else setting}/{norm}/{seed}"
                run_id = hashlib.sha256(what.encode(errors="replace")).hexdigest()[:12]
                labels = {"setting": setting, "norm": norm, "seed": seed}
                entries.append({"id": run_id, "labels": labels})
                arguments = run(setting, norm, seed)
                if arguments is None or (directory / run_id).exists():
                    continue
                given = {
                    "norm": norm,
                    "seed": seed,
                    "accuracy": made_up_accuracy(setting, norm, seed),
                    "overrides": overrides,
                    **arguments,
                }
                write_run(directory / run_id, **given)
    plan = {
        "schema_version": 1,
        "command": "normlab compare configs/digits.py --norms=... --seeds=3 --workdir=runs/demo",
        "config": "configs/digits.py",
        "settings": settings,
        "norms": norms,
        "seeds": seeds,
        "runs": entries,
    }
    (directory / "sweep.json").write_text(json.dumps(plan))
    return directory


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture
def make_sweep() -> Callable[..., Path]:
    return write_sweep


@pytest.fixture
def attack() -> str:
    return ATTACK


@pytest.fixture
def attacked(make_sweep, tmp_path):
    """A sweep in which every text that a report shows is an attack."""
    make_sweep(
        tmp_path,
        settings={ATTACK: {ATTACK: ATTACK}},
        norms=(ATTACK,),
        run=lambda setting, norm, seed: (
            {
                "message": ATTACK,
                "state": ("done", "failed", "diverged")[seed],
                "manifest": {
                    "git_commit": ATTACK,
                    "devices": [ATTACK],
                    "versions": {ATTACK: ATTACK + str(seed)},
                },
                "overrides": {"data.name": ATTACK, "model.kind": ATTACK},
            }
            | ({"overrides": {"data.name": ATTACK}} if seed else {})
        ),
    )
    plan = json.loads((tmp_path / "sweep.json").read_text())
    plan |= {"command": ATTACK, "config": ATTACK}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    return tmp_path

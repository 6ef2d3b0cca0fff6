"""Weights that others published, as a checkpoint that `normlab eval` reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from normlab.config import to_json
from normlab.errors import unknown
from normlab.interop import deepmind_nfnets, timm
from normlab.models import count_params
from normlab.training import parallel, snapshot
from normlab.training.setup import build_parts, id_of
from normlab.training.state import create_state

LOADERS: dict[str, Callable[[Path, ConfigDict], dict[str, Any]]] = {
    "deepmind-nfnets": deepmind_nfnets.load,
    "timm": timm.load,
}
"""What reads the files of each publisher."""


def publish(source: str, file: Path, config: ConfigDict, workdir: Path) -> int:
    """Writes the weights in a file as the checkpoint of step 0 of a new folder.

    Returns how many numbers they are. All else of the training state is that of a run that starts.
    Raises UserError, one line, for an unknown source, a folder that exists, a config that cannot
    be built, and as the loaders do.
    """
    if source not in LOADERS:
        raise unknown("source of weights", source, LOADERS)
    snapshot.check_new(workdir)
    parts = build_parts(config, need_data=False)
    params = LOADERS[source](file, config)["params"]
    state = create_state(parts, parallel.Compiler())
    ema = None if state.ema is None else {"params": params, "batch_stats": state.batch_stats}
    origin = {"from": source, "file": str(file.resolve())}
    snapshot.write(
        workdir,
        state.replace(params=params, ema=ema),
        config=to_json(config),
        manifest={"id": id_of(config), "imported": origin},
    )
    return count_params(params)

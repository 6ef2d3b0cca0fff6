"""Data sets in miniature take the place of the real ones."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict
from official import INFOS, Config, data_config

from normlab.data.info import DATASETS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, info in INFOS.items():
        monkeypatch.setitem(DATASETS, name, info)


@pytest.fixture
def archive() -> Config:
    """Makes a config.data of source "archive"."""

    def make(name: str, path: Path | str | None) -> ConfigDict:
        return data_config(name=name, source="archive", path=None if path is None else str(path))

    return make

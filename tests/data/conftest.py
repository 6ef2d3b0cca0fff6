"""Data sets in miniature take the place of the real ones."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from official import INFOS, Config

from normlab.data.info import DATASETS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, info in INFOS.items():
        monkeypatch.setitem(DATASETS, name, info)


@pytest.fixture
def archive() -> Config:
    """Makes a config.data of source "archive"."""

    def make(name: str, path: Path | str | None) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, source="archive", path=None if path is None else str(path)
        )

    return make

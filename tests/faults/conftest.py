"""A run that nothing disturbed, and disks that are small or cannot be written."""

import subprocess
from pathlib import Path

import pytest
from fault_tools import small

from normlab.training.loop import train

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of an undisturbed run of `small()`; not to be written."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(small(), folder)
    return folder


@pytest.fixture
def own(whole, tmp_path):
    """A copy of it, to be damaged."""
    subprocess.run(["cp", "-r", whole, tmp_path / "own"], check=True)
    return tmp_path / "own"


class Disk:
    """A file system of a fixed size in memory, which can be filled up and made read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, spare: int = 0) -> None:
        """Leaves `spare` bytes, to a page; what is there stays."""
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(file.tell() - spare, 0))

    def make_room(self) -> None:
        self._ballast.unlink()

    def protect(self, folder: Path) -> None:
        """Makes a folder read-only, also for the process that holds files in it open."""
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    def release(self, folder: Path) -> None:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "normlab-test", path]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount`")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)

"""Figures as files, SVG and PDF, for a paper or a repository."""

import re
from collections.abc import Iterable
from pathlib import Path

from normlab.report import canvas
from normlab.report.canvas import Panel

FOLDER = "figures"
_OURS = re.compile(r"(curves-\d+(-epochs|-seconds)?|swept-\d+|unit-([a-z0-9_]+-)?\d+)\.(svg|pdf)")


def write(panels: Iterable[Panel], folder: Path) -> list[Path]:
    """Writes NAME.svg and NAME.pdf of each panel, and removes those of an earlier report.

    Each is written whole or not at all. Returns the paths; without a panel no folder is made.
    """
    from normlab.run import write_bytes

    panels = list(panels)
    paths = []
    for panel, contents in zip(panels, canvas.files(panels), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in zip(("svg", "pdf"), contents, strict=True):
            paths.append(folder / f"{panel.name}.{suffix}")
            write_bytes(paths[-1], content)
    if folder.is_dir():
        for path in set(folder.iterdir()) - set(paths):
            if _OURS.fullmatch(path.name):
                path.unlink()
    return paths

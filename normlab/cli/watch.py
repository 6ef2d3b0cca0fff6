"""`normlab watch DIR`: the runs of a folder while they train.

Ctrl-C leaves with 130 and says nothing: 0 means that all runs have ended, so that
`normlab watch DIR && normlab report DIR` never reports on half of them.
"""

import argparse
import contextlib
import io
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from normlab.errors import UserError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from normlab.report.live import LiveRun, Watched

HELP = "watch runs while they train; ends when they do"

STYLES = {
    "running": "cyan",
    "planned": "dim",
    "done": "green",
    "diverged": "red",
    "failed": "bold red",
    "interrupted": "yellow",
}
BAR = 12  # characters
NAME = 28  # characters of a setting's or a folder's name, at most
SHORTENED = ("run", "norm")  # columns that give way where there is no room
SHORTEST = 5  # characters that they keep
CURVE = 12  # points
BLOCKS = "▁▂▃▄▅▆▇█"
LINES_AROUND = 6  # of a terminal, for what stands around the runs
GAP = 2  # characters between columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        help="folder of a sweep (sweep.json), of one run (config.json), or of run folders",
    )
    parser.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="between two looks (1)"
    )
    parser.add_argument("--once", action="store_true", help="print what is there now, and end")


def main(args: argparse.Namespace) -> int:
    """Shows the runs until none is planned or running; returns 0.

    Once only, if that is asked for or stdout is no terminal.
    """
    from rich.console import Console
    from rich.live import Live

    from normlab.report.live import Watched

    if not 0.0 < args.every < math.inf:
        raise UserError(f"--every={args.every:g} must be seconds above 0")
    watched = Watched(args.directory)
    watched.look()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of a character that the terminal has not
    console = Console(file=sys.stdout)
    if args.once or not sys.stdout.isatty():
        console.print(view(watched, time.time(), console.width))
        return 0
    with _left_by_signals(), Live(console=console, auto_refresh=False) as shown:
        while True:
            now, lines = time.time(), console.height - LINES_AROUND
            shown.update(view(watched, now, console.width, lines), refresh=True)
            if watched.is_over():
                return 0
            _sleep(args.every)
            watched.look()


def _sleep(seconds: float) -> None:
    """Sleeps in naps: a signal that comes just before one is only seen when it ends."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))


@contextlib.contextmanager
def _left_by_signals() -> Iterator[None]:
    """Lets SIGINT and SIGTERM leave the block in order, so that the terminal gets its cursor back.

    Raises SystemExit(128 + number).
    """

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# Drawing -----------------------------------------------------------------------------------------


def view(watched: "Watched", now: float, width: int, lines: int | None = None) -> "Group":
    """Returns what is to be shown at `now`: counts, and a table of at most `lines` runs.

    Running ones come first, then those that ended, the latest first. `width` in characters decides
    which columns there are.
    """
    from rich.console import Group
    from rich.text import Text

    from normlab.report.files import one_line

    counts = Counter(live.state for live in watched.runs)
    counted = Text(", ").join(
        Text(f"{counts[state]} {state}", STYLES[state]) for state in STYLES if counts[state]
    )
    where = (f" in {one_line(watched.directory)}", "bold")
    parts: list[Any] = [Text.assemble(counted, where, no_wrap=True, overflow="ellipsis")]

    running = [live for live in watched.runs if live.state == "running"]
    ended = [live for live in watched.runs if live.state not in ("running", "planned")]
    rows = [*running, *sorted(ended, key=lambda live: -live.status_written)]
    shown = rows if lines is None else rows[: max(lines, 1)]
    if shown:
        parts.append(_table(shown, now, width))
    if len(rows) > len(shown):
        parts.append(Text(f"and {len(rows) - len(shown)} more that have begun", "dim"))
    if counts["planned"] and not watched.is_worked_on():
        note = "Nobody works on the planned runs; type their command again."
        parts.append(Text(note, "yellow"))
    return Group(*parts)


class Column(NamedTuple):
    """One thing to say of each run."""

    title: str
    cell: Callable[["LiveRun", float], "Text | str"]
    leave_out: int = 0  # the highest goes first where there is no room; 0: never
    justify: Any = "right"


def _table(runs: Sequence["LiveRun"], now: float, width: int) -> Any:
    """Returns the table in as many columns as `width` characters hold."""
    from rich.table import Table
    from rich.text import Text

    columns = {column: [Text() + column.cell(live, now) for live in runs] for column in COLUMNS}
    columns = {column: cells for column, cells in columns.items() if any(map(len, cells))}

    widths = {
        column: min(max(cell.cell_len for cell in [Text(column.title), *cells]), NAME)
        for column, cells in columns.items()
    }

    def missing() -> int:
        return sum(widths.values()) + GAP * (len(widths) - 1) - width

    while missing() > 0 and (least := max(widths, key=lambda column: column.leave_out)).leave_out:
        del widths[least], columns[least]
    for column in [column for column in widths if column.title in SHORTENED]:
        widths[column] -= min(max(missing(), 0), max(widths[column] - SHORTEST, 0))
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for column, columns_width in widths.items():
        table.add_column(
            column.title,
            justify=column.justify,
            no_wrap=True,
            overflow="ellipsis",
            width=columns_width,
        )
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _progress(live: "LiveRun", _now: float) -> "Text":
    """A bar while a run is running; what became of it after."""
    from rich.text import Text

    if live.state != "running" or not live.num_steps:
        return Text(live.state, STYLES[live.state])
    share = min(live.step / live.num_steps, 1.0)
    done = int(BAR * share)
    return Text.assemble(
        ("━" * done, STYLES["running"]), ("─" * (BAR - done), "dim"), f" {100 * share:3.0f}%"
    )


def _steps(live: "LiveRun", _now: float) -> str:
    return f"{live.step}/{live.num_steps}" if live.num_steps else str(live.step)


def _speed(live: "LiveRun", _now: float) -> str:
    return "" if live.steps_per_second is None else f"{live.steps_per_second:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def curve(values: Sequence[float], points: int = CURVE) -> str:
    """Returns values as blocks, from their lowest to their highest, at most `points` of them."""
    count = min(points, len(values))
    picked = [values[(index + 1) * len(values) // count - 1] for index in range(count)]
    low, high = min(picked, default=0.0), max(picked, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in picked)


def duration(seconds: float | None) -> str:
    """Returns e.g. `45 s`, `12 min`, `3.4 h`; "" for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


COLUMNS = (
    Column("run", lambda live, _: live.setting, justify="left"),
    Column("norm", lambda live, _: live.norm, justify="left"),
    Column("seed", lambda live, _: "" if live.seed is None else str(live.seed)),
    Column("state", _progress, justify="left"),
    Column("step", _steps, leave_out=2),
    Column("loss", lambda live, _: "" if live.train_loss is None else f"{live.train_loss:.3g}", 3),
    Column("val. %", lambda live, _: _percent(live.validation_accuracy), 1),
    Column("test %", lambda live, _: _percent(live.test_accuracy)),
    Column("test curve", lambda live, _: curve(live.test_accuracies), 5, "left"),
    Column("steps/s", _speed, 4),
    Column("left", lambda live, now: duration(live.seconds_left(now))),
)

"""Progress of many runs: a bar with ETA on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import IO

from normlab.pool import Event


@contextlib.contextmanager
def show_progress(stream: IO[str]) -> Iterator[Callable[[Event], None]]:
    """Yields the function to be called with each event of a sweep."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start = time.monotonic()

    def remaining(event: Event) -> str:
        spent = time.monotonic() - start
        if event.fraction <= 0:
            return "estimating"
        return f"about {spent / event.fraction - spent:.0f} s left"

    def line(event: Event) -> str:
        counted = f"[{event.finished}/{event.total}]"
        return f"{counted} {event.label}: {event.message}, {remaining(event)}"

    if not stream.isatty():
        yield lambda event: print(line(event), file=stream, flush=True) if event.ended else None
        return
    console = Console(file=stream)
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(event: Event) -> None:
            done = event.fraction * event.total
            bar.update(task, total=event.total, completed=done, description=remaining(event))
            if event.ended:
                console.print(f"{event.label}: {event.message}", highlight=False, markup=False)

        yield show

"""Progress bars for anything that takes longer than two seconds; silent when nobody watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Advance(Protocol):
    """Moves the bar to ``done`` of its total, with a note beside it."""

    def __call__(self, done: float, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: float) -> Iterator[Advance]:
    """Yield ``advance(done, note)``, which moves a bar on standard error to ``done`` of ``total``."""
    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(done: float, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield advance

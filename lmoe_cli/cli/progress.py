"""A progress bar on stderr, where stderr is a terminal; nothing otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmoe_cli.cli.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Bar:
    """Told how many bytes there will be and how many came; see `hub.Progress`."""

    def __init__(self, drawn: RichProgress | None, title: str) -> None:
        self._drawn = drawn
        self._title = title
        self._task: TaskID | None = None

    def start(self, name: str, size: int) -> None:
        """Begin a line for a file, or for the whole where there is only one."""
        if self._drawn:
            self._task = self._drawn.add_task(f"{self._title} {name}".strip(), total=size)

    def advance(self, size: int) -> None:
        """So many more bytes."""
        if self._drawn and self._task is not None:
            self._drawn.advance(self._task, size)

    def close(self) -> None:
        """Take it from the screen before the block ends, for what comes after the bytes."""
        if self._drawn:
            self._drawn.stop()


@contextlib.contextmanager
def bar(out: Output, title: str, *, counts: bool = False) -> Iterator[Bar]:
    """A bar with bytes, speed and time left, for the length of a block; of things that are counted without speed."""
    if out.quiet or out.as_json or not sys.stderr.isatty():
        yield Bar(None, title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = (MofNCompleteColumn(),) if counts else (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        yield Bar(drawn, title)

"""Prints above a live prompt. The unfinished line of an answer stands in the prompt's own area until it is complete."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

from prompt_toolkit.application import Application
from rich.console import Console, RenderableType
from rich.text import Text

from lmoe_cli.chat.lines import Line, Lines

HOLD, SHOW = "\x1b[?2026h", "\x1b[?2026l"
"""Synchronised output: terminals that know it draw what lies between at once; others ignore it."""


class Screen:
    """Any thread may print; the thread of the application draws.

    Args:
        app: Runs the prompt.
        console: Gives text its colours; nothing is printed through it.
    """

    def __init__(self, app: Application[None], console: Console) -> None:
        self.tail = Line.of("", ())
        """What the prompt's area shows of the answer."""
        self._app = app
        self._console = console
        self._lines = Lines(lambda: self.columns - 1)
        self._pending = ""
        self._lock = threading.Lock()
        self._is_held = False
        app.after_render += self._release

    @property
    def columns(self) -> int:
        return self._app.output.get_size().columns

    @property
    def is_coloured(self) -> bool:
        return self._console.color_system is not None and not self._console.no_color

    def text(self, piece: str, style: str = "") -> None:
        """Print the next piece of an answer.

        Args:
            piece: As it came.
            style: A colour by rich's name, or none.
        """
        with self._lock:
            self._add(self._lines.add(piece, style))

    def end(self) -> None:
        """Complete the last line of an answer."""
        with self._lock:
            self._add(self._lines.end())

    def print(self, *shown: RenderableType) -> None:
        """Print whole lines."""
        with self._console.capture() as captured:
            for item in shown:
                self._console.print(item, width=self.columns)
        with self._lock:
            self._pending += captured.get()
            self._schedule()

    def close(self) -> None:
        """Print what is left once the prompt is gone."""
        self.end()
        with self._lock:
            self._write()
        self._release(self._app)

    def _add(self, lines: Sequence[Line]) -> None:
        self._pending += "".join(f"{self._painted(line)}\n" for line in lines)
        self._schedule()

    def _painted(self, line: Line) -> str:
        if not any(line.styles):
            return line
        with self._console.capture() as captured:
            self._console.print(Text.assemble(*((text, style) for style, text in line.runs)), end="", soft_wrap=True)
        return captured.get()

    def _schedule(self) -> None:
        loop = self._app.loop
        if not self._pending:
            self.tail = self._lines.rest
            self._app.invalidate()
        elif loop:
            with suppress(RuntimeError):  # closed just now: `close` prints what is left
                loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        """Move complete lines from the prompt's area to the scrollback, with no moment where they are in neither."""
        with self._lock:
            if self._pending:
                self._app.output.write_raw(HOLD)
                self._is_held = True
                self._app.renderer.erase()
                self._write()
                self.tail = self._lines.rest
        self._app.invalidate()

    def _release(self, _: Application[None]) -> None:
        """The prompt stands below what was printed."""
        if self._is_held:
            self._is_held = False
            self._app.output.write_raw(SHOW)
            self._app.output.flush()

    def _write(self) -> None:
        text, self._pending = self._pending, ""
        self._app.output.write_raw(text)
        self._app.output.flush()

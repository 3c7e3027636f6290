"""The process around a command: streams that are closed, full or no longer read, and signals that end it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

from lmoe_cli.errors import EXIT_SIGNAL


class TerminatedError(SystemExit):
    """A signal asked the program to end. It passes whatever handles errors only, so everything is cleaned up.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_SIGNAL + number)
        self.number = signal.Signals(number)


@contextmanager
def terminable() -> Iterator[None]:
    """Let ``SIGTERM`` and ``SIGHUP`` end what runs in the block as an interrupt does, unless they are ignored."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ending = [number for name in names if signal.getsignal(number := signal.Signals[name]) is signal.SIG_DFL]

    def terminate(number: int, _: FrameType | None) -> NoReturn:
        for other in ending:
            signal.signal(other, signal.SIG_IGN)  # the next one shall not end the cleaning up
        raise TerminatedError(number)

    for number in ending:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


class Unfailing(io.FileIO):
    """A descriptor to write to that never raises: a command ends as it would have, whoever reads what it says."""

    failure: OSError | None = None
    """Why what was written did not arrive, if so."""

    def write(self, data: Any, /) -> int:
        view = memoryview(data)
        if self.failure is None:
            try:
                return super().write(view)
            except OSError as error:
                self.failure = error
        return view.nbytes

    @property
    def is_unread(self) -> bool:
        """Whether the reader went away, as ``head`` does."""
        return self.failure is not None and self.failure.errno == errno.EPIPE


@contextmanager
def standard_streams() -> Iterator[Unfailing | None]:
    """Make the standard streams usable, whatever they are connected to.

    Yields:
        What is under stdout; None where Python code stands in for it.
    """
    _occupy_closed()
    before = sys.stdin, sys.stdout, sys.stderr
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    elif sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    stdout, sys.stdout = _unfailing(sys.stdout, 1)
    _, sys.stderr = _unfailing(sys.stderr, 2)
    try:
        yield stdout
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _occupy_closed() -> None:
    """Put something in the place of closed descriptors, or the next file that is opened would be taken for stdout."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)  # stdout shall not swallow the result


def _unfailing(stream: TextIO | None, descriptor: int) -> tuple[Unfailing | None, TextIO]:
    if stream is None:
        raw = Unfailing(descriptor, "w", closefd=False)
        return raw, io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace")
    with suppress(OSError, ValueError):  # text that is kept in memory has no descriptor
        stream.flush()
        raw = Unfailing(stream.fileno(), "w", closefd=False)
        return raw, io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="replace",  # what a terminal cannot show is a question mark, not a crash
            line_buffering=getattr(stream, "line_buffering", False),
            write_through=getattr(stream, "write_through", False),
        )
    return None, stream

"""A conversation line by line, where there is no terminal that could keep a prompt in place."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from lmoe_cli.chat.actions import greeting
from lmoe_cli.chat.commands import handle
from lmoe_cli.chat.events import Answer, Event, Leave, Letters, Text
from lmoe_cli.chat.lines import printable
from lmoe_cli.chat.quoted import is_open
from lmoe_cli.chat.session import Session
from lmoe_cli.chat.show import rendered
from lmoe_cli.findings import Finding

PROMPT = ">>> "
MORE = "... "


def converse(session: Session) -> None:
    """Read lines from stdin and answer them until it ends. Answers go to stdout, everything else to stderr."""
    talk = Console(stderr=True, highlight=False)
    for event in greeting(session):
        _show(event, talk)
    hinted = False
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:
            talk.print("" if not hinted else "/bye or Ctrl-D leaves", style="dim")
            hinted = not hinted
            continue
        if line is None:
            talk.print()
            return
        hinted = False
        session.go_on()
        with _interruptible(session):
            is_in_line = False
            for event in handle(session, line):
                if isinstance(event, Leave):
                    return
                if is_in_line and isinstance(event, Finding):  # an answer that failed has no end of its own
                    sys.stdout.write("\n")
                    sys.stdout.flush()
                is_in_line = isinstance(event, Text)
                _show(event, talk)


def _show(event: Event, talk: Console) -> None:
    if isinstance(event, Text):
        sys.stdout.write(printable(event.text))
        sys.stdout.flush()
        return
    if isinstance(event, Answer):
        sys.stdout.write("\n")
        sys.stdout.flush()
    if isinstance(event, Letters):  # stdout holds answers and nothing else: there are no letters in them
        return
    if (shown := rendered(event)) is not None:
        talk.print(shown)


def _read() -> str | None:
    """A line, or a message in quotes over several; None at the end of the input."""
    text = ""
    while True:
        sys.stderr.write(MORE if text else PROMPT)
        sys.stderr.flush()
        line = sys.stdin.readline()
        text += line
        if not line:
            return text or None
        if not is_open(text):
            return text.rstrip("\n")


@contextmanager
def _interruptible(session: Session) -> Iterator[None]:
    """Ctrl-C stops the answer, not the program."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        session.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

"""What a code stands for."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]


class Code(NamedTuple):
    """What a code stands for."""

    severity: Severity
    meaning: str
    remedy: str


def error(meaning: str, remedy: str) -> Code:
    """What stops a command."""
    return Code("error", meaning, remedy)


def warning(meaning: str, remedy: str) -> Code:
    """What asks to be looked at."""
    return Code("warning", meaning, remedy)


def note(meaning: str, remedy: str = "Nothing to do.") -> Code:
    """What only tells."""
    return Code("note", meaning, remedy)


AGAIN = "Download or save it again."
AUTHOR = "Ask its author for a sound version."

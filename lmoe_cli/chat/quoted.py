"""Messages of several lines, between three quotes."""

from __future__ import annotations

QUOTES = '"""'


def is_open(line: str) -> bool:
    """Whether a message that begins with three quotes still lacks the three that end it."""
    text = line.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


def message(line: str) -> str:
    """The text of a message, without the quotes around it."""
    text = line.strip()
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n") if text.startswith(QUOTES) else text

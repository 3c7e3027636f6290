"""Text that comes in pieces, as lines of a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len


class Lines:
    """Breaks an answer into lines between words, as it comes.

    Args:
        width: Gives the columns of the terminal.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self.rest = ""
        """The line that is not complete yet."""
        self._width = width

    def add(self, text: str) -> list[str]:
        """Take the next piece.

        Returns:
            The lines that are complete now.
        """
        *done, self.rest = (self.rest + printable(text)).split("\n")
        width = max(self._width(), 1)
        lines: list[str] = []
        for line in done:
            *full, last = wrap(line, width)
            lines += [*full, last]
        *full, self.rest = wrap(self.rest, width)
        return [*lines, *full]

    def end(self) -> list[str]:
        """The answer is over.

        Returns:
            What is left, unless nothing is.
        """
        left, self.rest = self.rest, ""
        return [left] if left else []


def wrap(line: str, width: int) -> list[str]:
    """Break a line that is too wide, after spaces where it has some."""
    found: list[str] = []
    while (cut := _cut(line, width)) is not None:
        found.append(line[:cut].rstrip(" "))
        line = line[cut:]
    return [*found, line]


def _cut(line: str, width: int) -> int | None:
    taken = after_space = 0
    for index, character in enumerate(line):
        if character == " ":
            after_space = index + 1
        taken += cell_len(character)
        if taken > width:
            return after_space or max(index, 1)
    return None


def printable(text: str) -> str:
    """Text without what would steer the terminal."""
    return "".join(
        character for character in text.replace("\t", "    ") if character == "\n" or not _is_control(character)
    )


def _is_control(character: str) -> bool:
    return ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0

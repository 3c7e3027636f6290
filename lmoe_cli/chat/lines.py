"""Text that comes in pieces, as lines of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from rich.cells import cell_len


class Line(str):
    """A line that knows how each of its characters looks."""

    __slots__ = ("styles",)
    styles: Sequence[str]

    @staticmethod
    def of(text: str, styles: Sequence[str]) -> Line:
        """Text with a style for each character; those beyond its end are dropped."""
        line = Line(text)
        line.styles = styles[: len(text)]
        return line

    @property
    def runs(self) -> list[tuple[str, str]]:
        """Style and text of what looks alike, one after the other."""
        pairs = zip(self.styles, self, strict=True)
        return [(style, "".join(each for _, each in group)) for style, group in groupby(pairs, lambda pair: pair[0])]


class Lines:
    """Breaks an answer into lines between words, as it comes.

    Args:
        width: Gives the columns of the terminal.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self.rest = Line.of("", ())
        """The line that is not complete yet."""
        self._width = width

    def add(self, text: str, style: str = "") -> list[Line]:
        """Take the next piece.

        Args:
            text: May have any number of lines.
            style: How it looks.

        Returns:
            The lines that are complete now.
        """
        text = printable(text)
        whole, styles = self.rest + text, [*self.rest.styles, *[style] * len(text)]
        width = max(self._width(), 1)
        lines: list[Line] = []
        for line in whole.split("\n"):
            lines += _wrapped(line, styles[: len(line)], width)
            styles = styles[len(line) + 1 :]
        self.rest = lines.pop()
        return lines

    def end(self) -> list[Line]:
        """The answer is over.

        Returns:
            What is left, unless nothing is.
        """
        left, self.rest = self.rest, Line.of("", ())
        return [left] if left else []


def _wrapped(line: str, styles: Sequence[str], width: int) -> list[Line]:
    """Break a line that is too wide, after spaces where it has some."""
    found: list[Line] = []
    for part in _parts(line, width):
        found.append(Line.of(part, styles[: len(part)]))
        styles = styles[len(part) :]
    return [*(Line.of(full.rstrip(" "), full.styles) for full in found[:-1]), found[-1]]


def _parts(line: str, width: int) -> list[str]:
    found: list[str] = []
    while (cut := _cut(line, width)) is not None:
        found.append(line[:cut])
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

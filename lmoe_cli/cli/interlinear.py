"""A text with letters under its tokens, as a terminal shows it: who had most say, with and without colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from lmoe_cli.readable import visible

BREAK = "↵"
"""Stands for a line break, which the line below it also makes."""


@dataclass(frozen=True)
class Cell:
    """A token, and what stands under it."""

    text: str
    under: tuple[Text, ...]
    """A character for each row."""
    style: str
    ends_line: bool


def cell(text: str, under: Sequence[Text], style: str) -> Cell:
    """Make a token fit to be shown.

    Args:
        text: Of the token.
        under: A character for each row.
        style: Of the text.
    """
    ends = "\n" in text
    shown = visible(text.replace("\n", BREAK).replace("\t", "⇥"))
    return Cell(shown, tuple(under), style, ends)


def lines(cells: Sequence[Cell], width: int, labels: Sequence[str]) -> Iterator[Text]:
    """Lay cells out in lines.

    Args:
        cells: Those without text are left out.
        width: Columns of the terminal.
        labels: Of the rows under the text, in front of them; may be empty.

    Yields:
        Lines of text, each followed by its rows, and by an empty line where there are several.
    """
    margin = max((cell_len(label) + 1 for label in labels if label), default=0)
    for line in _broken([one for one in cells if one.text], max(width - margin, 1)):
        text = Text(" " * margin)
        for one in line:
            text.append(one.text, one.style)
        yield text
        for number, label in enumerate(labels):
            row = Text(set_cell_size(label, margin), "dim")
            for one in line:
                row.append_text(_under(one, one.under[number]))
            row.rstrip()
            yield row
        if len(labels) > 1:
            yield Text()


def _under(one: Cell, mark: Text) -> Text:
    """A row's part under one token: the mark under its first letter."""
    wide, before = cell_len(one.text), len(one.text) - len(one.text.lstrip(" "))
    before = before if before < wide else 0
    if wide == 0:  # joins what stands before it
        return Text()
    found = Text(" " * before)
    found.append_text(mark)
    return found.append(" " * (wide - before - 1))


def _broken(cells: Sequence[Cell], width: int) -> Iterator[list[Cell]]:
    """Cells in lines that are not too wide, broken before words where there is one to break before."""
    line: list[Cell] = []
    for one in cells:
        while line and sum(cell_len(other.text) for other in line) + cell_len(one.text) > width:
            starts = [number for number, other in enumerate(line) if number and other.text.startswith(" ")]
            cut = len(line) if one.text.startswith(" ") or not starts else starts[-1]
            yield line[:cut]
            line = line[cut:]
            if line:
                line[0] = replace(line[0], text=line[0].text.lstrip(" ") or " ")
            one = one if line else replace(one, text=one.text.lstrip(" ") or " ")
        line.append(one)
        if one.ends_line:
            yield line
            line = []
    if line:
        yield line

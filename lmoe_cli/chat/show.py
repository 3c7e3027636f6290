"""How the events of a conversation look."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as Styled

from lmoe_cli.chat.events import Answer, Event, Facts, Heading, Letters, Note, weights_text
from lmoe_cli.chat.legend import Legend
from lmoe_cli.engine.legend import NOBODY
from lmoe_cli.findings import Finding

BAR = 24
"""Columns of a bar of shares."""
COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
ENDS = {"interrupted": "stopped", "length": "cut off", "context": "context full"}


def rendered(event: Event) -> RenderableType | None:
    """What to print for an event; None for pieces of text, which run on, and for what says nothing."""
    match event:
        case Note(text):
            return Styled(text, style="dim")
        case Heading(text):
            return Styled(f"\n{text}", style="bold")
        case Answer():
            line = Styled(status(event), style="dim")
            return line if event.shares is None else Group(_shares(event.shares), line)
        case Letters(names):
            return Legend(names).line()
        case Finding():
            return _finding(event)
        case Facts(title, rows):
            return _facts(title, rows)
    return None


def status(answer: Answer) -> str:
    """The line after an answer."""
    timings = answer.timings
    parts = [
        f"{timings.tokens_per_s:.1f} tok/s" if timings.tokens_per_s else "",
        f"first token {timings.first_token_s:.2f} s",
        weights_text(answer.weights),
        ENDS.get(answer.finish, ""),
    ]
    return " · ".join(part for part in parts if part)


def _shares(shares: Mapping[str, float]) -> Styled:
    """The bar after an answer: letters as long as each expert's share, and the numbers."""
    legend = Legend(list(shares))
    told = [legend.name(name).append(f" {share:.0%}") for name, share in shares.items()]
    if (rest := 1 - sum(shares.values())) > 0.005:
        told.append(Styled(f"{NOBODY} base {rest:.0%}", style="dim"))
    return Styled("  ").join([legend.bar(shares, BAR), *told])


def _finding(found: Finding) -> Styled:
    text = Styled.assemble((f"{found.severity}: ", COLOURS[found.severity]), found.message)
    return text.append(f"\n  hint: {found.hint}", style="dim") if found.hint else text


def _facts(title: str, rows: tuple[tuple[str, str], ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Styled(name), Styled(value))
    return table

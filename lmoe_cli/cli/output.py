"""The one sink for what lmoe says: data on stdout, talk on stderr, or one JSON document."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.errors import LmoeError
from lmoe_cli.findings import Finding, RefusedError, from_error
from lmoe_cli.readable import MAX_TEXT, shortened, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

MAX_FINDINGS = 20
STEERING = {number: f"\\u{number:04x}" for number in range(0x7F, 0xA0)}
"""Control characters that JSON lets pass as they are."""
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


@dataclass
class Output:
    """How a command talks."""

    command: str
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    _stdout: Console | None = field(default=None, init=False)

    def say(self, text: str) -> None:
        """Tell a person how it goes; never part of the result."""
        if not self.quiet:
            click.echo(visible(text), err=True)

    def warn(self, findings: Iterable[Finding]) -> None:
        """Tell warnings, and notes where more was asked for, of a command that goes on."""
        if self.as_json or self.quiet:
            return
        show_findings([item for item in findings if item.severity != "note" or self.verbose])

    def show(self, *rendered: RenderableType) -> None:
        """Print part of the result for a person to read."""
        if not self.as_json:
            for item in rendered:
                self.console.print(item)

    @property
    def console(self) -> Console:
        """A rich console on stdout."""
        if self._stdout is None:
            from rich.console import Console

            width = None if sys.stdout.isatty() else 120
            self._stdout = Console(highlight=False, soft_wrap=False, width=width)
        return self._stdout

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print rows under headings."""
        if self.as_json:
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title=_escape(title) or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
        )
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*[_cell(value) for value in row])
        self.console.print(table)

    def facts(self, title: str, pairs: Iterable[tuple[str, Any]]) -> None:
        """Print names and values, one pair a line."""
        if self.as_json:
            return
        rows = list(pairs)
        width = max((len(name) for name, _ in rows), default=0)
        self.console.print(f"[bold]{_escape(title)}[/]", soft_wrap=True)
        for name, value in rows:
            self.console.print(f"[dim]{name:<{width}}[/]  {_cell(value)}", soft_wrap=True)

    def finish(self, data: Any, findings: Sequence[Finding] = (), *, ok: bool = True) -> None:
        """Print the JSON document, where one was asked for."""
        if self.as_json:
            print_document(self.command, data, findings, ok=ok)


def _cell(value: Any) -> str:
    if value is None:
        return "[dim]–[/]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return _escape(", ".join(str(item) for item in value)) or "[dim]–[/]"
    return _escape(str(value))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(visible(shortened(text, MAX_TEXT)))


def print_document(command: str, data: Any, findings: Sequence[Finding], *, ok: bool) -> None:
    """Print the envelope of ``--json``."""
    document = {
        "schema": f"lmoe.{command}/1",
        "ok": ok,
        "data": data,
        "findings": [item.as_dict() for item in findings],
    }
    text = json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False)
    click.echo(text.translate(STEERING))


def show_findings(findings: Sequence[Finding]) -> None:
    """Print findings to stderr, as many as somebody reads."""
    for item in findings[:MAX_FINDINGS]:
        _show_finding(item)
    if len(findings) > MAX_FINDINGS:
        click.echo(f"and {len(findings) - MAX_FINDINGS} more; --json tells all", err=True)


def _show_finding(item: Finding) -> None:
    """Severity and code, where and what, and what to do."""
    colour = not os.environ.get("NO_COLOR") and sys.stderr.isatty()
    label = click.style(f"{item.severity}[{item.code}]", fg=COLOURS[item.severity], bold=True) if colour else None
    click.echo(f"{label or f'{item.severity}[{item.code}]'}: {item.message}", err=True, color=colour)
    if item.hint:
        click.echo(f"  hint: {item.hint}", err=True)


def show_error(error: LmoeError, *, command: str, as_json: bool) -> None:
    """Print an error, and every finding that led to it."""
    findings = error.findings if isinstance(error, RefusedError) else (from_error(error),)
    if as_json:
        print_document(command, None, findings, ok=False)
        return
    show_findings(findings)
    if isinstance(error, RefusedError):
        click.echo(str(error), err=True)


def size(amount: float) -> str:
    """Bytes for a person: ``"1.2 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def count(amount: float) -> str:
    """A large number for a person: ``"3.2 M"``."""
    for unit in ("", " k", " M"):
        if amount < 1000:
            return f"{amount:.0f}" if not unit else f"{amount:.1f}{unit}"
        amount /= 1000
    return f"{amount:.1f} B"

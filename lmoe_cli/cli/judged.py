"""Files to judge by or to suit, as a command line names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.data.examples import Encoder, TooLong
    from lmoe_cli.engine.engine import Engine
    from lmoe_cli.evaluate.domains import Domain
    from lmoe_cli.evaluate.variants import Stage

MAX_TOKENS = 4096
"""Tokens of a record that are judged, where the base takes more."""
cut_at = click.option(
    "--max-tokens", type=click.IntRange(2), metavar="N", help=f"Most of a record; {MAX_TOKENS}, or what the base holds."
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}\Z")


@dataclass(frozen=True)
class Judged:
    """What is judged by, as the command line says it."""

    data: dict[str, Path]
    select: dict[str, Path]
    split: str | None
    limit: int | None
    max_tokens: int | None
    too_long: TooLong

    def read(self, stage: Stage, files: dict[str, Path]) -> list[Domain]:
        """The domains of some files, in tokens of the loaded base."""
        from lmoe_cli.evaluate.domains import read_domain

        encoder = encoder_of(stage.engine, self.max_tokens, self.too_long)
        return [
            read_domain(name, path, encoder, stage.engine.decode, split=self.split, limit=self.limit)
            for name, path in files.items()
        ]


def encoder_of(engine: Engine, max_tokens: int | None, too_long: TooLong) -> Callable[[], Encoder]:
    """What makes an encoder for a loaded base."""
    from lmoe_cli.data.examples import Encoder
    from lmoe_cli.evaluate.losses import vocabulary_of

    limit = min(engine.context, max_tokens or MAX_TOKENS)
    return lambda: Encoder(engine.tokenizer, limit, too_long, vocabulary_of(engine.model))


def named_files(given: Sequence[str], option: str) -> dict[str, Path]:
    """Name → file, of ``NAME=FILE``, or of a file that is called so.

    Raises:
        UsageError: A name stands twice, or is none.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if not equals or not NAME.match(name):
            name, rest = Path(text).stem, text
        if not NAME.match(name):
            raise UsageError("usage", f"{option} {text}: '{name}' is no name", hint=f"{option} NAME=FILE")
        if name == "mean":
            raise UsageError("usage", f"{option} {text}: the mean of all domains is called so", hint="another name")
        if not rest:
            raise UsageError("usage", f"{option} {text}: no file", hint=f"{option} NAME=FILE")
        if name in found:
            hint = f"{option} OTHER={rest}"
            raise UsageError("usage", f"{option} {text}: two domains are called '{name}'", hint=hint)
        found[name] = Path(rest)
    return found


def require_readable(path: Path) -> None:
    """Refuse a file that does not even begin as data, before anything is loaded."""
    from lmoe_cli.data.records import read_records

    next(read_records(path))

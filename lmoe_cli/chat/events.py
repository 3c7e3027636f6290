"""What a conversation has to say, as plain data; a terminal decides how it looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lmoe_cli.engine.generate import Finish, Timings
from lmoe_cli.findings import Finding


@dataclass(frozen=True)
class Text:
    """The next piece of an answer."""

    text: str
    expert: str | None = None
    """Who has most say in it, where that is shown and an expert has."""


@dataclass(frozen=True)
class Answer:
    """An answer is complete, or was stopped."""

    text: str
    finish: Finish | Literal["interrupted"]
    timings: Timings
    weights: Mapping[str, float]
    """In force at its end; empty where the base answered alone."""
    shares: Mapping[str, float] | None = None
    """How much say each expert had in its tokens, where that is shown; see `lmoe_cli.engine.say`."""


@dataclass(frozen=True)
class Note:
    """Something to know, in a line."""

    text: str


@dataclass(frozen=True)
class Heading:
    """What the next answer is."""

    text: str


@dataclass(frozen=True)
class Letters:
    """What stands for each expert in what follows."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Leave:
    """The user wants to go."""


Event = Text | Answer | Note | Heading | Letters | Facts | Finding | Leave


def weights_text(weights: Mapping[str, float]) -> str:
    """Weights in one line; with none, it is the base that answers."""
    return " ".join(f"{name} {weight:.2f}" for name, weight in weights.items()) or "base"

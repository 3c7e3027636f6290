"""How experts are told apart at a glance: a letter each, and a colour; and who of them leads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

COLOURS = (
    "cyan", "magenta", "yellow", "green", "blue", "red",
    "bright_cyan", "bright_magenta", "bright_yellow", "bright_green", "bright_blue", "bright_red",
)  # fmt: skip
"""Of a terminal, by the names that rich gives them. With more experts they begin anew; letters never do."""
NOBODY = "·"
"""Stands where no expert has most say."""


def letters(names: Sequence[str]) -> dict[str, str]:
    """A letter for each expert: the first of its own that no other has, as a capital.

    Args:
        names: Of the experts, each once.

    Returns:
        Name → one character, a column wide; no two alike.
    """
    found: dict[str, str] = {}
    for name in names:
        taken = set(found.values())
        found[name] = next(letter for letter in _candidates(name) if letter not in taken)
    return found


def _candidates(name: str) -> Iterator[str]:
    yield from (letter for letter in name.upper() if letter.isascii() and letter.isalnum())
    yield from "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    yield from (letter for number in range(0xC0, 0x250) if (letter := chr(number)).isupper())


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each expert.

    Args:
        names: Of the experts, each once.

    Returns:
        Name → one of `COLOURS`.
    """
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def leader(shares: Mapping[str, float]) -> str | None:
    """The expert with most say; None where the base alone has more than any of them.

    Args:
        shares: Expert's name → share, which together are 1 at most; see `lmoe_cli.engine.say`.
    """
    best = max(shares, key=lambda name: shares[name], default=None)
    return None if best is None or shares[best] < max(1 - sum(shares.values()), 1e-6) else best

"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def at_least(value: float, target: float | None, digits: int = 2) -> str:
    """A target in a cell, and whether it is missed by a value that is shown with so many digits."""
    if target is None:
        return ""
    return f"≥ {target:.2f}" + (", **missed**" if round(value, digits) < round(target, 2) else "")


def at_most(value: float, target: float | None, unit: str = "") -> str:
    """A target in a cell, and whether it is missed."""
    if target is None:
        return ""
    return f"≤ {target:.2f}{unit}" + (", **missed**" if round(value, 2) > round(target, 2) else "")

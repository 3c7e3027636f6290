"""The bar under the prompt: a name, a gauge and a weight for each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prompt_toolkit.formatted_text import StyleAndTextTuples as Fragments

GAUGE = 10
"""Cells of a gauge where there is room. A full one is weight 1; what goes beyond is laid over it."""
BLOCKS = " ▏▎▍▌▋▊▉█"
EMPTY = "░"


def weights_bar(weights: Mapping[str, float], selected: int, width: int, right: str, *, ascii_only: bool) -> Fragments:
    """Draw the bar, in one line of ``width`` columns.

    Where there is little room gauges shrink, then what stands at the right goes, then all but the selected expert and
    its neighbours.

    Args:
        weights: Expert's name → weight in force.
        selected: Number of the expert whose knob is selected; -1 where no knob turns.
        width: Columns.
        right: Stands at the right end.
        ascii_only: The terminal has no blocks.
    """
    texts = [f" {name} {_number(weight)}" for name, weight in weights.items()]
    right = right if sum(map(len, texts)) + len(right) + 2 <= width else ""
    room = width - len(right) - 2
    gauge = next((size for size in range(GAUGE, 1, -1) if sum(len(text) + size for text in texts) <= room), 0)
    shown = _around(texts, max(selected, 0), room) if sum(map(len, texts)) > room else range(len(texts))
    more = ("<", ">") if ascii_only else ("‹", "›")
    found: Fragments = [("class:bar.more", more[0] if shown.start > 0 else " ")]
    for number, (name, weight) in enumerate(weights.items()):
        if number in shown:
            style = "class:bar.selected" if number == selected else "class:bar.name"
            label = name.replace("×", "x") if ascii_only else name
            found.append((style, f" {label} "))
            if gauge:
                found += _gauge(weight, gauge, ascii_only=ascii_only)
            found.append((style if not gauge else "class:bar.weight", _number(weight)))
    found.append(("class:bar.more", more[1] if shown.stop < len(texts) else " "))
    space = width - sum(len(part[1]) for part in found) - len(right)
    return [*found, ("class:bar.right", " " * max(space, 0) + right)]


def _number(weight: float) -> str:
    return f" {weight:.2f} "


def _around(texts: Sequence[str], selected: int, room: int) -> range:
    """As many neighbours of the selected one as there is room for."""
    first = last = selected
    taken = len(texts[selected])
    while True:
        if last + 1 < len(texts) and taken + len(texts[last + 1]) <= room:
            last += 1
            taken += len(texts[last])
        elif first > 0 and taken + len(texts[first - 1]) <= room:
            first -= 1
            taken += len(texts[first])
        else:
            return range(first, last + 1)


def _gauge(weight: float, size: int, *, ascii_only: bool) -> Fragments:
    style = "class:bar.negative" if weight < 0 else "class:bar.positive"
    over = min(round((abs(weight) - 1) * size), size)
    if over > 0:
        block = "#" if ascii_only else BLOCKS[-1]
        return [("class:bar.over", block * over), (style, block * (size - over))]
    if ascii_only:
        full = round(min(abs(weight), 1.0) * size)
        return [(style, "#" * full), ("class:bar.empty", "-" * (size - full))]
    full, part = divmod(round(min(abs(weight), 1.0) * size * 8), 8)
    filled = BLOCKS[-1] * full + (BLOCKS[part] if part else "")
    return [(style, filled), ("class:bar.empty", EMPTY * (size - len(filled)))]

"""Zero part of a delta: what the methods that thin out are made of.

A delta is looked at block by block, perhaps in several threads, and the same rows come out whatever their number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from lmoe_cli.bake.blocks import blocks, scratch
from lmoe_cli.bake.methods.method import Thin, Whole

SAMPLE, SAMPLED = 1 << 13, 64
"""Elements that are looked at for a first guess of how large the smallest one is that stays: so many, or one of so many
where that is more."""
ROWS = 2048
"""From which they are taken: rows are of different size, elements of a row less so."""
MARGINS = (1.4, 10.0, math.inf)
"""How far, as a share of all elements and times the root of the sample's number, that guess may be off; the next one
where it was further. In that unit the share of a sample has a standard deviation of at most 0.5."""
TOGETHER = 16
"""Elements that are passed over together where none of them is near the guess."""
CHANCES = 1 << 16
"""How finely a chance is drawn."""


def keep_largest(whole: Whole, density: float) -> Thin | None:
    """Keep the largest elements by magnitude. Of equal ones at the edge, the first stay.

    Args:
        whole: The delta, finite.
        density: Share to keep, in (0, 1]; at least one element stays.
    """
    size = whole.shape[0] * whole.shape[1]
    count = max(1, int(density * size))
    if count >= size:
        return None
    above, between = _around_the_edge(whole, count)
    collected = torch.cat(list(between))
    edge = float(collected.kthvalue(len(collected) - (count - above) + 1).values)
    spare = count - above - int((collected > edge).sum())
    places: dict[int, int] = {}
    for (start, _), part in zip(_starts(whole), between, strict=True):
        equal = int((part == edge).sum())
        if equal > spare:
            places[start] = spare
        spare = max(0, spare - equal)

    # What is not larger than the number below the edge goes: one pass, where to fill in by a mask takes forty.
    below = float(torch.nextafter(torch.tensor(edge), torch.tensor(0.0)))

    def thin(rows: Tensor, block: slice) -> None:
        if block.start in places:
            flat = rows.view(-1)
            flat[(flat.abs() == edge).nonzero()[places[block.start] :, 0]] = 0.0
        torch.hardshrink(rows, below, out=rows)

    return thin


def _around_the_edge(whole: Whole, count: int) -> tuple[int, Sequence[Tensor]]:
    """How many magnitudes are surely among the ``count`` largest, and those among which the smallest of them is."""
    sample, share = _sample(whole), count / (whole.shape[0] * whole.shape[1])
    for margin in MARGINS:
        above, between = _look(whole, *_bracket(sample, share, margin / math.sqrt(len(sample))))
        if above < count <= above + sum(len(part) for part in between):
            return above, between
    raise AssertionError("the widest margin holds everything")


def _starts(whole: Whole) -> list[tuple[int, int]]:
    return cast("list[tuple[int, int]]", whole.look(lambda rows: (rows.start, rows.stop)))


def _sample(whole: Whole) -> Tensor:
    """Some magnitudes of a delta, from rows all over it, the largest first."""
    count, width = whole.shape
    step = max(1, count // ROWS)
    wanted = max(SAMPLE, count * width // SAMPLED)
    gap = (count // step * width // wanted) | 1  # odd, so that it meets all columns
    parts = [
        whole.rows(slice(block.start * step, min(block.stop * step, count), step)).view(-1)[::gap].abs()
        for block in blocks((-(-count // step), width))
    ]
    return torch.cat(parts).sort(descending=True).values


def _bracket(sample: Tensor, share: float, margin: float) -> tuple[float, float]:
    """Magnitudes between which the smallest element probably lies that belongs to the largest ``share``."""
    if math.isinf(margin):
        return 0.0, math.inf
    first, last = int((share - margin) * len(sample)), int((share + margin) * len(sample)) + 1
    high = math.inf if first <= 0 else float(sample[first])
    return (0.0 if last >= len(sample) else float(sample[last])), high


def _look(whole: Whole, low: float, high: float) -> tuple[int, Sequence[Tensor]]:
    """How many magnitudes are at least ``high``, and those that are smaller and at least ``low``, per block."""

    def look(rows: slice) -> tuple[int, Tensor]:
        magnitude = whole.rows(rows).abs_()
        # Comparisons give 0.0 or 1.0 four times as fast as they give a bool.
        above = torch.ge(magnitude, high, out=scratch("above", magnitude.shape))
        count = int(above.sum())
        inside = torch.ge(magnitude, low, out=scratch("inside", magnitude.shape)).sub_(above)
        return count, _selected(magnitude.view(-1), inside.view(-1))

    found = cast("list[tuple[int, Tensor]]", whole.look(look))
    return sum(count for count, _ in found), [part for _, part in found]


def _selected(values: Tensor, mask: Tensor) -> Tensor:
    """The values, (n,), where a mask of 1.0 and 0.0 has 1.0: few of them, so that most are passed over in groups."""
    end = len(values) // TOGETHER * TOGETHER
    groups = mask[:end].view(-1, TOGETHER)
    near = groups.amax(dim=1).nonzero()[:, 0]
    own, rest = values[:end].view(-1, TOGETHER)[near], values[end:]
    return torch.cat([own[groups[near] > 0], rest[mask[end:] > 0]])


def drop_at_random(whole: Whole, chance: Callable[[Tensor], float | Tensor]) -> Thin:
    """Keep each element with a probability, and scale what is left to the same sum of magnitudes.

    Args:
        whole: The delta.
        chance: Gives the probability of some rows: one for all, or of their shape, float32.
    """

    def look(rows: slice) -> tuple[float, float]:
        delta = whole.rows(rows)
        kept = draw(chance(delta), delta.shape, f"{whole.seed}/{rows.start}")
        magnitude = delta.abs_()
        return float(magnitude.sum()), float(magnitude.mul_(kept).sum())

    sums = cast("list[tuple[float, float]]", whole.look(look))
    before, after = (sum(pair[side] for pair in sums) for side in (0, 1))
    scale = before / after if before >= 1e-7 and after >= 1e-7 else 1.0

    def thin(rows: Tensor, block: slice) -> None:
        rows.mul_(draw(chance(rows), rows.shape, f"{whole.seed}/{block.start}")).mul_(scale)

    return thin


def draw(chance: float | Tensor, shape: Sequence[int], seed: str) -> Tensor:
    """Which elements are kept.

    Args:
        chance: To be kept: one for all, or of the shape, float32. Drawn to 1 in 65,536.
        shape: (n, m).
        seed: The same one gives the same draws.

    Returns:
        1 or 0, of the shape, float32; memory of this thread.
    """
    size = shape[0] * shape[1]
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(number)
    words = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    drawn = words.view(torch.int16)[:size].view(*shape)  # four draws from each word
    kept = scratch("drawn", drawn.shape)
    if isinstance(chance, float):
        return torch.lt(drawn, min(round(chance * CHANCES), CHANCES - 1) - CHANCES // 2, out=kept)
    return torch.lt(kept.copy_(drawn), chance * CHANCES - CHANCES // 2, out=kept)

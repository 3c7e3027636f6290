"""Zero part of a delta in place: what the methods that thin out are made of.

All work block by block, so that beside the delta itself they hold next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
LOW_BITS = 16
"""Of a float32 seen as an integer; magnitudes order as those integers do."""


def keep_largest(delta: Tensor, density: float) -> None:
    """Zero all but the largest elements by magnitude. Of equal ones at the edge, the first stay.

    Args:
        delta: Contiguous, any shape, float32, finite; changed in place.
        density: Share to keep, in (0, 1]; at least one element stays.
    """
    count = max(1, int(density * delta.numel()))
    if count >= delta.numel():
        return
    flat = delta.view(-1)
    high, above = _largest_bin(flat, count, lambda bits: bits >> LOW_BITS)
    inside = (1 << LOW_BITS) - 1
    low, above_low = _largest_bin(
        flat, count - above, lambda bits: (bits & inside)[bits >> LOW_BITS == high], size=1 << LOW_BITS
    )
    edge, spare = (high << LOW_BITS) | low, count - above - above_low
    for block in flat.split(BLOCK_ELEMENTS):  # type: ignore[no-untyped-call]
        bits = _magnitude_bits(block)
        at_edge = (bits == edge).nonzero()[:, 0]
        block[bits < edge] = 0.0
        block[at_edge[spare:]] = 0.0
        spare = max(0, spare - len(at_edge))


def _largest_bin(
    flat: Tensor, count: int, keys: Callable[[Tensor], Tensor], size: int = 1 << (31 - LOW_BITS)
) -> tuple[int, int]:
    """The bin that holds the ``count``-th largest key, and how many keys are in larger bins."""
    totals = torch.zeros(size, dtype=torch.int64)
    for block in flat.split(BLOCK_ELEMENTS):  # type: ignore[no-untyped-call]
        totals += torch.bincount(keys(_magnitude_bits(block)), minlength=size)
    from_top = totals.flip(0).cumsum(0)
    place = int((from_top < count).sum())
    return size - 1 - place, int(from_top[place - 1]) if place else 0


def _magnitude_bits(block: Tensor) -> Tensor:
    return block.abs().view(torch.int32)


def drop_at_random(delta: Tensor, chance: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
    """Keep each element with a probability, and scale what is left to the same sum of magnitudes.

    Args:
        delta: (n, m), float32; changed in place.
        chance: Gives the probabilities of some rows, of their shape, float32.
        generator: Source of the draws, row by row.
    """
    before = after = 0.0
    for rows in delta.split(max(1, BLOCK_ELEMENTS // max(1, delta.shape[1]))):  # type: ignore[no-untyped-call]
        before += float(rows.abs().sum(dtype=torch.float64))
        rows.mul_(torch.bernoulli(chance(rows), generator=generator))
        after += float(rows.abs().sum(dtype=torch.float64))
    if before >= 1e-7 and after >= 1e-7:
        delta.mul_(before / after)

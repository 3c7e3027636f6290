"""How much of a matrix one program takes: the place for numbers that depend on the device.

They follow from arithmetic for an H100 (132 processors, 3.3 TB/s, so about 2 MB of loads under way at any time) and
from what the compiler makes of them; none has been measured on one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_BATCH = 32
"""Vectors that one launch takes. Beyond, launches weigh little and the products of a library do better."""
LEAST = 16
"""Of each side of a product of tiles."""
PROCESSORS = 132
"""Of the device. A grid with fewer blocks leaves some of them idle."""


@dataclass(frozen=True)
class Tile:
    """What one program takes at a time."""

    rows: int
    """Of the matrix; a power of two, like all of these."""
    columns: int
    """Of the matrix and of the vectors."""
    batch: int
    """Vectors, those that are not there included; 1, or enough for a product of tiles."""
    warps: int
    stages: int
    """How many tiles are loaded ahead, where tiles are multiplied."""


def down(dtype: torch.dtype, width: int, rows: int, batch: int) -> Tile:
    """For matrices that are read along their rows: W and A.

    Args:
        dtype: Of the matrices and vectors.
        width: d_in.
        rows: Of all matrices in the launch; few of them are spread thinly, so that every processor has some.
        batch: N.
    """
    if batch == 1:
        # Four loads of 16 bytes per thread and step.
        columns = 512 if dtype == torch.float32 else 1024
        return Tile(4 if rows > 512 else 1, _between(LEAST, width, columns), 1, 4, 1)
    # Every block reads all vectors, from the cache: the more of them, the more rows a block needs to make that little.
    tall = LEAST if batch <= 4 else 32 if batch <= LEAST or dtype == torch.float32 else 64
    while tall > LEAST and rows < tall * PROCESSORS:
        tall //= 2
    if dtype == torch.float32:
        return Tile(tall, 32, _padded(batch), 4, 3)
    # A block that has its processor to itself keeps more under way.
    return Tile(tall, 128 if rows > 512 else 256, _padded(batch), 4 if tall > 32 else 2, 4)


def up(rank: int, rows: int, batch: int) -> Tile:
    """For B, whose rows are short.

    Args:
        rank: The largest R of any member, or of any expert where experts are chosen.
        rows: Of all members.
        batch: N; 1 where experts are chosen.
    """
    tall = 32 if rows > 4096 else LEAST
    if batch == 1:
        return Tile(tall, _between(LEAST, rank, 128), 1, 4, 1)
    return Tile(tall, _between(LEAST, rank, 32), _padded(batch), 4, 1)


def _padded(batch: int) -> int:
    return LEAST if batch <= LEAST else MAX_BATCH


def _between(least: int, size: int, most: int) -> int:
    """The power of two that holds a size, within limits."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))

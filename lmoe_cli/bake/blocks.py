"""Blocks of rows, small enough that a thread computes one in its core's own cache."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block: with all that is computed of them in float32 they fit the cache."""

_OF_THREAD = threading.local()


def blocks(shape: Sequence[int]) -> list[slice]:
    """The blocks of rows of a matrix (n, m)."""
    step = max(1, BLOCK_ELEMENTS // max(1, shape[1]))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


@contextmanager
def single_threaded() -> Iterator[int]:
    """Let every thread compute by itself: a product split over threads also adds up in another order.

    Yields:
        How many threads torch had.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def scratch(name: str, shape: Sequence[int]) -> Tensor:
    """Memory of this thread to compute in, of a shape, float32: fresh memory would cost more than the sums."""
    held: dict[str, Tensor] = _OF_THREAD.__dict__
    size = math.prod(shape)
    if name not in held or held[name].numel() < size:
        held[name] = torch.empty(size)
    return held[name][:size].view(*shape)

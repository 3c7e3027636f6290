"""Where weights lie: mapped from files, or in memory of their own."""

from __future__ import annotations

import math
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

LARGE_BYTES = 4 << 20
"""Of memory that is worth pages of two megabytes."""


class Mapped:
    """The files that are mapped into this process at present; none where the system does not tell."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()] if maps.is_file() else []
        ranges = [words[0].split("-") for words in lines if len(words) == 6 and words[5].startswith("/")]
        self._ranges = sorted((int(start, 16), int(end, 16)) for start, end in ranges)
        self._starts = [start for start, _ in self._ranges]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is a file: what nobody wrote to takes none of this process's own."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        start = tensor.data_ptr()
        number = bisect_right(self._starts, start) - 1
        return number >= 0 and start + tensor.nbytes <= self._ranges[number][1]


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory on the CPU for a tensor, in large pages where the system has them: small ones are slow to come by."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)

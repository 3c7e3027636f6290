"""Which weights lie in files that are mapped, rather than in memory of this process."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from torch import Tensor


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

"""Write a safetensors file tensor by tensor, without holding it in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lmoe_cli.checkpoint.header import ITEM_BITS
from lmoe_cli.files import NewFile


class Shape(NamedTuple):
    """Dtype and shape of a tensor to be written."""

    dtype: str
    """safetensors name, such as ``"BF16"``."""
    sides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.sides) * ITEM_BITS[self.dtype] // 8


def header_bytes(tensors: Mapping[str, Shape], metadata: Mapping[str, str]) -> bytes:
    """The start of a file that holds these tensors in this order, up to the first tensor."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, shape in tensors.items():
        entries[name] = {
            "dtype": shape.dtype,
            "shape": list(shape.sides),
            "data_offsets": [start, start + shape.size],
        }
        start += shape.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


class ShardWriter(NewFile):
    """A safetensors file being written. Append the tensors' bytes in the order of ``tensors``.

    Args:
        path: Must not exist.
        tensors: Name → dtype and shape.
        metadata: Free text, such as ``{"format": "pt"}``.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Shape], metadata: Mapping[str, str]) -> None:
        super().__init__(path, hashed=True)
        self.write(header_bytes(tensors, metadata))

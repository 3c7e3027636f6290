"""Packed matrices as the numbers they stand for, a few rows at a time, to the last bit as bitsandbytes gives them.

4 bit   w = c[code] a          c of NF4: Dettmers et al. 2023, appendix E       https://arxiv.org/abs/2305.14314
                               a is the scale of a block of weights, row by row; packed itself, a = q[code] s + o
8 bit   w = code s / 127       s is the scale of a row: Dettmers et al. 2022    https://arxiv.org/abs/2208.07339
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.checkpoint.packed import Packed, Scales

FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (*FP4, *(-code for code in FP4)),
}  # fmt: skip
"""Kind → what each of the 16 codes stands for. Like bitsandbytes' products, this leaves a checkpoint's own table be."""
PER_UNIT = 7.874015718698502e-3
"""1/127, as bitsandbytes writes it."""


class Matrix:
    """A packed matrix, of which slices of rows are read. Nothing dense is kept.

    Args:
        packed: Where it is.
        read: Gives a stored tensor, mapped rather than copied.
    """

    def __init__(self, packed: Packed, read: Callable[[Stored], Tensor]) -> None:
        self.shape = torch.Size(packed.shape)
        """(d_out, d_in), as it was packed."""
        self.dtype: torch.dtype = getattr(torch, FLOATS[packed.info.dtype])
        self._kind, self._blocks = packed.kind, packed.scales
        weight = read(packed.parts["weight"])
        if packed.scales is None:
            self._codes = weight
            self._scale = read(packed.parts["SCB"]).to(torch.float32).flatten()  # (d_out,)
        else:
            self._codes = weight.flatten().view(torch.uint8)  # two codes a byte
            self._scale = _scales(packed, packed.scales, read)

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows.

        Args:
            rows: Without a step.

        Returns:
            (n, d_in), in the dtype that bitsandbytes gives: of 4 bit the one the model had, of 8 bit float32.
        """
        if self._blocks is None:
            return self._codes[rows].to(torch.float32) * self._scale_of(rows) * PER_UNIT
        return (self._look_up(CODES[self._kind], rows) * self._scale_of(rows)).to(self.dtype)

    def misplaced(self, rows: slice, dense: Tensor) -> int:
        """How many weights would be packed as another code than they are, if they were those of ``dense``.

        Args:
            rows: Which; without a step.
            dense: (n, d_in), any float dtype.
        """
        scale = self._scale_of(rows)
        exact = dense.to(torch.float32) / torch.where(scale == 0, 1.0, scale)
        if self._blocks is None:
            return int((torch.round(exact / PER_UNIT) != self._codes[rows]).sum())
        lower, upper = (self._look_up(bounds, rows) for bounds in _bounds(CODES[self._kind]))
        return exact.numel() - int(((exact >= lower) & (exact <= upper)).sum())  # NaN lies next to none

    def _scale_of(self, rows: slice) -> Tensor:
        """The scale of every weight of some rows, (n, d_in), or where a row shares one (n, 1); float32."""
        if self._blocks is None:
            return self._scale[rows, None]
        first, last, cut = self._span(rows)
        return self._scale[first:last].repeat_interleave(self._blocks.block)[cut].view(-1, self.shape[1])

    def _look_up(self, numbers: Sequence[float], rows: slice) -> Tensor:
        """A number for the code of every weight of some rows of a 4-bit matrix, (n, d_in), float32."""
        assert self._blocks is not None, "codes of 8 bit are numbers"
        first, last, cut = self._span(rows)
        half = self._blocks.block // 2
        data = self._codes[first * half : last * half]
        data = F.pad(data, (0, (last - first) * half - data.numel()))  # the last block may be shorter
        # Both numbers of a byte are moved as one of 64 bits: seven times as fast as row by row of a table.
        pairs = _pairs(numbers).view(torch.float64).flatten()
        return pairs.index_select(0, data.to(torch.int32)).view(torch.float32)[cut].view(-1, self.shape[1])

    def _span(self, rows: slice) -> tuple[int, int, slice]:
        """The blocks that hold some rows, from and to, and which of their weights these rows are."""
        assert self._blocks is not None, "8 bit has no blocks"
        start, stop, _ = rows.indices(self.shape[0])
        begin, end = start * self.shape[1], max(start, stop) * self.shape[1]
        first, last = begin // self._blocks.block, -(-end // self._blocks.block)
        offset = first * self._blocks.block
        return first, last, slice(begin - offset, end - offset)


def _pairs(numbers: Sequence[float]) -> Tensor:
    """The two numbers of every byte, (256, 2), float32: the code in its upper half comes first."""
    table, byte = torch.tensor(numbers), torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1)


def _bounds(codes: Sequence[float]) -> tuple[list[float], list[float]]:
    """Between which numbers each code is the nearest."""
    ordered = sorted(set(codes))
    edges = [-math.inf, *((one + other) / 2 for one, other in pairwise(ordered)), math.inf]
    places = [ordered.index(code) for code in codes]
    return [edges[place] for place in places], [edges[place + 1] for place in places]


def _scales(packed: Packed, scales: Scales, read: Callable[[Stored], Tensor]) -> Tensor:
    """The scale of each block of weights, (blocks,), float32."""
    stored = read(packed.parts["absmax"]).flatten()
    if not scales.outer_block:
        return stored.to(torch.float32)
    table = read(packed.parts["nested_quant_map"]).to(torch.float32).flatten()
    outer = read(packed.parts["nested_absmax"]).to(torch.float32).flatten()
    spread = outer.repeat_interleave(scales.outer_block)[: stored.numel()]
    return table[stored.to(torch.int32)] * spread + torch.tensor(scales.offset)

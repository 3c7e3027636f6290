"""Rows of one tensor on their way into a file: changed, rounded and measured by several threads, appended in order.

Each block is computed by one thread, and blocks do not depend on how many there are: so neither do the bytes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmoe_cli.bake.blocks import scratch
from lmoe_cli.bank.delta import ROW_BLOCK_ELEMENTS
from lmoe_cli.checkpoint.raw import raw
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.files import NewFile

LOOKAHEAD = 4
"""Pieces that are computed ahead of the one being written."""
SAMPLED = 8
"""Of so many blocks one is measured for what rounding takes away."""

Advance = Callable[[int], None]
"""Told the bytes that were written."""


class Block(NamedTuple):
    """Some rows of a tensor."""

    elements: int
    """How many."""
    read: Callable[[], Tensor]
    """Gives them as the base has them."""
    change: Callable[[Tensor], None] | None = None
    """Changes them in place, float32; None where they only take another dtype."""
    fused: Callable[[Tensor, Tensor], None] | None = None
    """Writes what the base has, changed, into the output at once, where the matrix unit does that."""


@dataclass
class Measured:
    """What became of some rows."""

    before: float = 0.0
    """Squared norm of the rows in the base, as are the others."""
    changed: float = 0.0
    after: float = 0.0
    sampled: float = 0.0
    """Of those rows of the result that were measured for what rounding takes away."""
    lost: float = 0.0
    """What it took from them."""
    compared: int = 0
    """Elements from the matrix unit that were compared with the float32 sum, rounded."""
    differing: int = 0
    """How many of them are another number."""

    def add(self, other: Measured) -> None:
        """Add what became of other rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Sink:
    """Where the rows of one tensor go.

    Args:
        name: Of the base's tensor, for messages.
        writer: The file.
        dtype: To round to.
        pool: Threads that compute.
        advance: Told the bytes that were written.
        change: Norm of the whole change where it is known; it is measured where it is None.
    """

    def __init__(
        self,
        name: str,
        writer: NewFile,
        dtype: torch.dtype,
        pool: Executor,
        advance: Advance,
        change: float | None = None,
    ) -> None:
        self.name, self.writer, self.dtype, self.pool, self.advance = name, writer, dtype, pool, advance
        self.measured = Measured()
        self._change = change

    def add(self, blocks: Iterable[Block]) -> None:
        """Append blocks in order, several of them at a time computed by a thread of the pool.

        Raises:
            InvalidFileError: The base holds NaN or infinity, or a result is too large for the dtype.
        """
        waiting: deque[Future[tuple[memoryview, Measured]]] = deque()
        for piece in _pieces(blocks):
            waiting.append(self.pool.submit(self._compute, piece))
            if len(waiting) > LOOKAHEAD:
                self._append(*waiting.popleft().result())
        while waiting:
            self._append(*waiting.popleft().result())

    def _compute(self, piece: Sequence[tuple[int, Block]]) -> tuple[memoryview, Measured]:
        out = torch.empty(sum(block.elements for _, block in piece), dtype=self.dtype)
        total, place = Measured(), 0
        for number, block in piece:
            end = place + block.elements
            total.add(self._round(block, out[place:end], is_sampled=number % SAMPLED == 0))
            place = end
        return raw(out), total

    def _round(self, block: Block, out: Tensor, *, is_sampled: bool) -> Measured:
        """Change and round one block; what is computed on the way stays in a core's cache."""
        found = Measured()
        before = block.read()
        out = out.view(before.shape)
        if block.fused:
            found.before = _squares(before)
            block.fused(before, out)
            found.after = _squares(out)
            if not is_sampled:
                return found
        exact = scratch("exact", before.shape).copy_(before)
        found.before = found.before or _squares(exact)
        plain = None
        if self._change is None:
            plain = scratch("plain", exact.shape).copy_(exact)
        if block.change:
            block.change(exact)
        if not block.fused:
            out.copy_(exact)
            found.after = _squares(exact)
        if plain is not None:
            found.changed = _squares(torch.sub(exact, plain, out=plain))
        if is_sampled:
            lost = scratch("lost", exact.shape)
            found.sampled, found.lost = found.after, _squares(torch.sub(lost.copy_(out), exact, out=lost))
            if block.fused:
                found.compared, found.differing = out.numel(), int((exact.to(self.dtype) != out).sum())
        if self.dtype == torch.float16 and not torch.isfinite(out).all():
            found.after = math.inf
        return found

    def _append(self, data: memoryview, found: Measured) -> None:
        if not math.isfinite(found.before):
            raise _not_finite(self.name)
        if not math.isfinite(found.after):
            kind = str(self.dtype).removeprefix("torch.")
            hint = "try --dtype bfloat16 or float32, or smaller weights"
            raise InvalidFileError("bake-overflow", f"{self.name}: a blended weight does not fit {kind}", hint=hint)
        self.measured.add(found)
        self.writer.write(data)
        self.advance(data.nbytes)

    @property
    def change(self) -> float:
        """Norm of the change, before rounding, relative to that of the base."""
        norm = math.sqrt(self.measured.changed) if self._change is None else self._change
        return norm / math.sqrt(self.measured.before) if self.measured.before else 0.0

    @property
    def rounding(self) -> float:
        """Norm of what rounding took away, relative to that of the result, measured on a part of the rows."""
        return math.sqrt(self.measured.lost / self.measured.sampled) if self.measured.sampled else 0.0


def _pieces(blocks: Iterable[Block]) -> Iterator[list[tuple[int, Block]]]:
    """Blocks with their numbers, as many together as are written at a time."""
    piece: list[tuple[int, Block]] = []
    filled = 0
    for number, block in enumerate(blocks):
        piece.append((number, block))
        filled += block.elements
        if filled >= ROW_BLOCK_ELEMENTS:
            yield piece
            piece, filled = [], 0
    if piece:
        yield piece


def require_finite(tensor: Tensor, name: str) -> None:
    """Refuse NaN and infinity in a tensor of the base.

    Raises:
        InvalidFileError: It holds some.
    """
    for block in tensor.reshape(-1).split(ROW_BLOCK_ELEMENTS):  # type: ignore[no-untyped-call]
        # A sum passes NaN and infinity on, and is read much faster; that of huge numbers may overflow by itself.
        if not math.isfinite(float(block.sum(dtype=torch.float32))) and not torch.isfinite(block).all():
            raise _not_finite(name)


def _not_finite(name: str) -> InvalidFileError:
    hint = "the base is damaged: download it again"
    return InvalidFileError("weights-not-finite", f"the base's {name} holds NaN or infinity", hint=hint)


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2

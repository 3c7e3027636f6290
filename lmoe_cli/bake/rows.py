"""Rows of one tensor on their way into a file: changed, rounded and measured by several threads, appended in order.

Each block is computed by one thread, and blocks do not depend on how many there are: so neither do the bytes.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmoe_cli.bank.delta import ROW_BLOCK_ELEMENTS
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.files import NewFile

LOOKAHEAD = 4
"""Blocks that are computed ahead of the one being written."""

_OF_THREAD = threading.local()

Advance = Callable[[int], None]
"""Told the bytes that were written."""


class Block(NamedTuple):
    """Some rows of a tensor."""

    before: Tensor
    """As the base has them."""
    exact: Tensor
    """As they shall be, float32."""


@dataclass(frozen=True)
class _Rounded:
    data: memoryview
    before: float
    """Squared norm of the rows in the base, as are the others."""
    changed: float
    after: float
    lost: float


class Sink:
    """Where the rows of one tensor go.

    Args:
        name: Of the base's tensor, for messages.
        writer: The file.
        dtype: To round to.
        pool: Threads that compute.
        advance: Told the bytes that were written.
    """

    def __init__(self, name: str, writer: NewFile, dtype: torch.dtype, pool: Executor, advance: Advance) -> None:
        self.name, self.writer, self.dtype, self.pool, self.advance = name, writer, dtype, pool, advance
        self._before = self._changed = self._after = self._lost = 0.0

    def add(self, blocks: Iterable[Callable[[], Block]]) -> None:
        """Append blocks in order, each computed by a thread of the pool.

        Raises:
            InvalidFileError: The base holds NaN or infinity, or a result is too large for the dtype.
        """
        waiting: deque[Future[_Rounded]] = deque()
        for block in blocks:
            waiting.append(self.pool.submit(self._round, block))
            if len(waiting) > LOOKAHEAD:
                self._append(waiting.popleft().result())
        while waiting:
            self._append(waiting.popleft().result())

    def _round(self, compute: Callable[[], Block]) -> _Rounded:
        block = compute()
        exact = block.exact
        rounded = exact.to(self.dtype)
        scratch = _scratch(exact)  # fresh memory for every step would cost more than the arithmetic
        before, after = _squares(scratch.copy_(block.before.view_as(exact))), _squares(exact)
        changed = _squares(torch.sub(exact, scratch, out=scratch))
        lost = _squares(scratch.copy_(rounded).sub_(exact))
        data = memoryview(rounded.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
        return _Rounded(data, before, changed, after, lost)

    def _append(self, rows: _Rounded) -> None:
        if not math.isfinite(rows.before):
            raise _not_finite(self.name)
        if not math.isfinite(rows.lost):
            kind = str(self.dtype).removeprefix("torch.")
            hint = "try --dtype bfloat16 or float32, or smaller weights"
            raise InvalidFileError("bake-overflow", f"{self.name}: a blended weight does not fit {kind}", hint=hint)
        self._before += rows.before
        self._changed += rows.changed
        self._after += rows.after
        self._lost += rows.lost
        self.writer.write(rows.data)
        self.advance(rows.data.nbytes)

    @property
    def change(self) -> float:
        """Norm of the change, before rounding, relative to that of the base."""
        return math.sqrt(self._changed / self._before) if self._before else 0.0

    @property
    def rounding(self) -> float:
        """Norm of what rounding took away, relative to that of the result."""
        return math.sqrt(self._lost / self._after) if self._after else 0.0


def _scratch(like: Tensor) -> Tensor:
    """Memory of this thread to compute in, of a tensor's shape, float32."""
    held: Tensor | None = getattr(_OF_THREAD, "scratch", None)
    if held is None or held.numel() < like.numel():
        held = _OF_THREAD.scratch = torch.empty(like.numel())
    return held[: like.numel()].view(like.shape)


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
    return float(torch.linalg.vector_norm(tensor)) ** 2

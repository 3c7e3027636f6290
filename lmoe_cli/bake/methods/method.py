"""What every method takes and gives: thin each delta by itself, then add, with or without electing signs.

No delta is ever held whole. Its rows are computed when they are looked at, block by block, which takes less time than
to write them to memory and read them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe_cli.bake.blocks import blocks, scratch

Rows = Callable[[slice], Tensor]
"""Gives some rows of one expert's delta, (k, m), float32, to be changed by whoever asks."""
Thin = Callable[[Tensor, slice], None]
"""Zeroes part of some rows of a delta in place."""
Each = Callable[[Callable[[slice], object], Iterable[slice]], Iterable[object]]
"""Calls something with each of several blocks, perhaps in threads; what it gives comes in order. As `map`."""


@dataclass(frozen=True)
class Settings:
    """What a recipe's ``bake:`` says to a method."""

    density: float
    """Share of each delta that is kept, in (0, 1]."""
    epsilon: float
    """How far the chance to be kept spreads by magnitude."""
    normalize: bool | None
    """Divide by the weights; None leaves it to the method."""
    seed: str
    """Of random draws for this tensor."""


@dataclass(frozen=True)
class Whole:
    """One expert's delta, to be looked at before it is thinned."""

    rows: Rows
    shape: tuple[int, int]
    each: Each
    seed: str
    """Of this expert's random draws."""

    def look(self, at: Callable[[slice], object]) -> list[object]:
        """Call something with each block of rows."""
        return list(self.each(at, blocks(self.shape)))


@dataclass(frozen=True)
class Method:
    """A way to combine task vectors."""

    thin: Callable[[Whole, Settings], Thin | None]
    """Looks at one delta and says how it is to be thinned; None where all of it is kept."""
    elects_sign: bool
    """Of each element, only deltas with the sign of the weighted sum count."""
    normalizes: bool
    """Divides by the weights unless told otherwise."""


class TaskVectors:
    """What a method makes of the deltas of one matrix.

    Args:
        method: Which.
        deltas: One per expert that changes the matrix.
        shape: Of the matrix as it is stored, (n, m).
        weights: Of these experts. Dimensionless.
        others: Sum of the weights of the experts that leave the matrix as it is: their deltas are zero.
        settings: Of the recipe.
        each: Calls something with each block, perhaps in threads.
    """

    norm = None
    """Of the change: not known beforehand. See `bank.delta.Update.norm`."""

    def __init__(
        self,
        method: Method,
        deltas: Sequence[Rows],
        shape: tuple[int, int],
        weights: Sequence[float],
        others: float,
        settings: Settings,
        each: Each = map,
    ) -> None:
        self._deltas, self._shape, self._weights, self._method = deltas, shape, weights, method
        wholes = [Whole(rows, shape, each, f"{settings.seed}/{number}") for number, rows in enumerate(deltas)]
        self._thins = [method.thin(whole, settings) for whole in wholes]
        self._normalize = method.normalizes if settings.normalize is None else settings.normalize
        self._sum = sum(weights) + others

    def add_to(self, rows: Tensor, start: int) -> None:
        """Change rows from ``start``, where a block begins, in place. See `bank.delta.Update.add_to`."""
        for block in blocks(self._shape):
            if start <= block.start < start + rows.shape[0]:
                rows[block.start - start : block.stop - start].add_(self._combined(block))

    def _combined(self, block: slice) -> Tensor:
        total: Tensor | None = None
        weighted = []
        for number, (rows, thin, weight) in enumerate(zip(self._deltas, self._thins, self._weights, strict=True)):
            delta = rows(block)
            if thin:
                thin(delta, block)
            delta.mul_(weight)
            if self._method.elects_sign:  # the next one is computed where this was
                delta = scratch(f"weighted{number}", delta.shape).copy_(delta)
            weighted.append(delta)
            total = scratch("total", delta.shape).copy_(delta) if total is None else total.add_(delta)
        assert total is not None, "there is a delta"
        if not self._method.elects_sign:
            return total.div_(self._sum) if self._normalize and abs(self._sum) >= 1e-8 else total
        return self._elected(weighted, total)

    def _elected(self, weighted: Sequence[Tensor], total: Tensor) -> Tensor:
        """The sum, or mean, of those elements that have the sign of their sum; a zero agrees with nothing."""
        sign = torch.ge(total, 0.0, out=scratch("sign", total.shape)).mul_(2).sub_(1)  # 1 or -1
        sums, agrees = total.zero_(), scratch("agrees", total.shape)
        divisor = scratch("divisor", total.shape).zero_() if self._normalize else None
        for delta, weight in zip(weighted, self._weights, strict=True):
            torch.mul(delta, sign, out=agrees).gt_(0.0)  # 1 or 0
            sums.addcmul_(delta, agrees)
            if divisor is not None:
                divisor.add_(agrees, alpha=weight)
        if divisor is None:
            return sums
        return sums.div_(
            divisor.add_(torch.eq(divisor, 0.0, out=agrees))
        )  # to fill in by a mask takes ten times as long

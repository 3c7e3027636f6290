"""What every method takes and gives: thin each delta by itself, then add, with or without electing signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What a recipe's ``bake:`` says to a method."""

    density: float
    """Share of each delta that is kept, in (0, 1]."""
    epsilon: float
    """How far the chance to be kept spreads by magnitude."""
    normalize: bool | None
    """Divide by the weights; None leaves it to the method."""
    generator: torch.Generator
    """Source of random draws, seeded for this tensor."""


@dataclass(frozen=True)
class Method:
    """A way to combine task vectors."""

    thin: Callable[[Tensor, Settings], None]
    """Zeroes part of one delta, (n, m), float32, in place."""
    elects_sign: bool
    """Of each element, only deltas with the sign of the weighted sum count."""
    normalizes: bool
    """Divides by the weights unless told otherwise."""


class TaskVectors:
    """What a method makes of the deltas of one matrix.

    Args:
        method: Which.
        deltas: One per expert that changes the matrix, (n, m), contiguous, float32; thinned in place.
        weights: Of these experts. Dimensionless.
        others: Sum of the weights of the experts that leave the matrix as it is: their deltas are zero.
        settings: Of the recipe.
    """

    def __init__(
        self, method: Method, deltas: Sequence[Tensor], weights: Sequence[float], others: float, settings: Settings
    ) -> None:
        for delta in deltas:
            method.thin(delta, settings)
        self._method, self._deltas = method, deltas
        self._weights = torch.tensor(weights).view(-1, 1, 1)
        self._normalize = method.normalizes if settings.normalize is None else settings.normalize
        self._sum = sum(weights) + others

    norm = None
    """Of the change: not known beforehand. See `bank.delta.Update.norm`."""

    def add_to(self, rows: Tensor, start: int) -> None:
        """Change rows from ``start`` on in place. See `bank.delta.Update.add_to`."""
        rows.add_(self._combined(slice(start, start + rows.shape[0])))

    def _combined(self, rows: slice) -> Tensor:
        weighted = torch.stack([delta[rows] for delta in self._deltas]).mul_(self._weights)  # (E, k, m)
        total = weighted.sum(dim=0)
        if not self._method.elects_sign:
            return total / self._sum if self._normalize and abs(self._sum) >= 1e-8 else total
        agrees = weighted.sign() == (total >= 0).to(weighted.dtype).mul_(2).sub_(1)  # a zero agrees with nothing
        elected = (weighted * agrees).sum(dim=0)
        if not self._normalize:
            return elected
        divisor = (self._weights * agrees).sum(dim=0)
        return elected / torch.where(divisor == 0, torch.ones_like(divisor), divisor)

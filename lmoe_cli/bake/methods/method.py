"""What every method takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe_cli.bake.methods.thinning import agree_on_sign, shares


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

    def normalize_or(self, default: bool) -> bool:
        return default if self.normalize is None else self.normalize


Method = Callable[[list[Tensor], list[float], Settings], Tensor]
"""``combine(deltas, weights, settings)``: one delta per expert, (n, m), float32, and their weights, to one delta."""


def divided(total: Tensor, weights: list[float], *, normalize: bool) -> Tensor:
    """A sum of weighted deltas, divided by the sum of the weights where that is wanted and not zero."""
    divisor = sum(weights)
    return total / divisor if normalize and abs(divisor) >= 1e-8 else total


def divided_by_agreement(weighted: Tensor, weights: list[float], *, normalize: bool) -> Tensor:
    """Add the weighted deltas that agree in sign, divided by the weights of those where that is wanted.

    Args:
        weighted: (E, ...), float32, weights folded in.
        weights: Of each expert.
        normalize: Whether to divide.
    """
    mask = agree_on_sign(weighted)
    total = (weighted * mask).sum(dim=0)
    if not normalize:
        return total
    divisor = (shares(weights, weighted) * mask).sum(dim=0)
    return total / torch.where(divisor == 0, torch.ones_like(divisor), divisor)

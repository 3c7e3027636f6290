"""W + B A by the processor's matrix unit, in 16 bits.

    B = B_h + B_l,  A = A_h + A_l,  each half in 16 bits          W + B A = W + [B_h B_l B_h] [A_h; A_h; A_l]

up to B_l A_l, which is smaller than the last digit of float32. The unit multiplies 16-bit numbers, adds in float32 and
rounds once when it stores; the factors go in as two halves, and halves of zeros, as where an adapter is stored in 16
bits itself, are left out. The sum is taken in another order than in float32, so a few elements that lie near the middle
between two numbers are rounded to the other one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe_cli.bank.delta import Update


@dataclass(frozen=True)
class Halves:
    """A low-rank change whose factors are split for the matrix unit."""

    left: Tensor
    """(n, K), bfloat16."""
    right: Tensor
    """(K, m), bfloat16."""

    def into(self, rows: Tensor, start: int, out: Tensor) -> None:
        """Write changed rows, rounded once.

        Args:
            rows: As stored, (k, m), bfloat16.
            start: Number of the first of them.
            out: Same shape and dtype.
        """
        torch.addmm(rows, self.left[start : start + rows.shape[0]], self.right, out=out)


def split(change: Update) -> Halves | None:
    """Split a change for the matrix unit; None where it is more than a product of two factors."""
    if not change.is_low_rank or change.left is None or change.right is None:
        return None
    left, right = _halves(change.left), _halves(change.right)
    pairs = [(left[0], right[0]), (left[1], right[0]), (left[0], right[1])]
    kept = [(b, a) for b, a in pairs if b.any() and a.any()] or pairs[:1]
    return Halves(torch.cat([b for b, _ in kept], dim=1), torch.cat([a for _, a in kept]))


def has_matrix_unit() -> bool:
    """Whether this processor has a unit for products of bfloat16 that is worth the detour."""
    return torch.cpu._is_amx_tile_supported()


def _halves(factor: Tensor) -> tuple[Tensor, Tensor]:
    high = factor.bfloat16()
    return high, (factor - high.float()).bfloat16()

"""DELLA: drop elements at random, small ones more likely, rescale, elect signs, and average those that agree.

    Deep et al. 2024, sec. 3                https://arxiv.org/abs/2406.11617

Within a row, the chance to be kept rises evenly from density - epsilon for the smallest to density + epsilon for the
largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmoe_cli.bake.methods.method import Method, Settings, Thin, Whole
from lmoe_cli.bake.methods.thinning import drop_at_random


def drop_small(whole: Whole, settings: Settings) -> Thin | None:
    """Drop elements of each row, small ones more likely."""

    def chance(rows: Tensor) -> Tensor:
        line = rows.view(1, -1) if whole.shape[1] == 1 else rows  # a vector, such as a bias, is one row
        return _chances(line, settings).view(rows.shape)

    return drop_at_random(whole, chance) if settings.density < 1 else None


def _chances(rows: Tensor, settings: Settings) -> Tensor:
    """The chance of each element to be kept, (n, m)."""
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(torch.float32)  # 0 is the smallest
    spread = ranks / max(1, rows.shape[1] - 1)
    return (settings.density - settings.epsilon) + spread * 2 * settings.epsilon


DELLA = Method(drop_small, elects_sign=True, normalizes=True)

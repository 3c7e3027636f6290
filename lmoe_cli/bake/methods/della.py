"""DELLA: drop elements at random, small ones more likely, rescale, elect signs, and average those that agree.

    Deep et al. 2024, sec. 3                https://arxiv.org/abs/2406.11617

Within a row, the chance to be kept rises evenly from density - epsilon for the smallest to density + epsilon for the
largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmoe_cli.bake.methods.method import Method, Settings
from lmoe_cli.bake.methods.thinning import drop_at_random


def drop_small(delta: Tensor, settings: Settings) -> None:
    """Drop elements of each row, small ones more likely, in place."""
    if settings.density < 1:
        rows = delta.view(1, -1) if delta.shape[1] == 1 else delta  # a vector, such as a bias, is one row
        drop_at_random(rows, lambda some: _chances(some, settings), settings.generator)


def _chances(rows: Tensor, settings: Settings) -> Tensor:
    """The chance of each element to be kept, (n, m)."""
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(torch.float32)  # 0 is the smallest
    spread = ranks / max(1, rows.shape[1] - 1)
    return (settings.density - settings.epsilon) + spread * 2 * settings.epsilon


DELLA = Method(drop_small, elects_sign=True, normalizes=True)

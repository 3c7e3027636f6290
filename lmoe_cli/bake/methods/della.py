"""DELLA: drop elements at random, small ones more likely, rescale, elect signs, and average those that agree.

    Deep et al. 2024, sec. 3                https://arxiv.org/abs/2406.11617

Within a row, the chance to be kept rises evenly from density - epsilon for the smallest to density + epsilon for the
largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmoe_cli.bake.methods.method import Settings, divided_by_agreement
from lmoe_cli.bake.methods.thinning import drop_at_random, weigh


def della(deltas: list[Tensor], weights: list[float], settings: Settings) -> Tensor:
    """Combine task vectors of one tensor. See `method.combine`."""
    if settings.density < 1:
        deltas = [drop_at_random(delta, _chances(delta, settings), settings.generator) for delta in deltas]
    return divided_by_agreement(weigh(deltas, weights), weights, normalize=settings.normalize_or(True))


def _chances(delta: Tensor, settings: Settings) -> Tensor:
    """The chance of each element to be kept, (n, m)."""
    rows = delta if delta.dim() > 1 else delta[None]
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(torch.float32)  # 0 is the smallest
    spread = ranks / max(1, rows.shape[1] - 1)
    return ((settings.density - settings.epsilon) + spread * 2 * settings.epsilon).view_as(delta)

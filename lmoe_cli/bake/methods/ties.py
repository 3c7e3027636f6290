"""TIES: trim each delta, elect a sign per element, and average those that agree with it.

Yadav et al. 2023, algorithm 1          https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from torch import Tensor

from lmoe_cli.bake.methods.method import Settings, divided_by_agreement
from lmoe_cli.bake.methods.thinning import keep_largest, weigh


def ties(deltas: list[Tensor], weights: list[float], settings: Settings) -> Tensor:
    """Combine task vectors of one tensor. See `method.combine`."""
    kept = weigh([keep_largest(delta, settings.density) for delta in deltas], weights)
    return divided_by_agreement(kept, weights, normalize=settings.normalize_or(True))

"""Keep the largest elements of each delta, then add.

dW = sum_e w_e top_d(dW_e)          the trimming step of Yadav et al. 2023       https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from torch import Tensor

from lmoe_cli.bake.methods.method import Settings, divided
from lmoe_cli.bake.methods.thinning import keep_largest, weigh


def magnitude(deltas: list[Tensor], weights: list[float], settings: Settings) -> Tensor:
    """Combine task vectors of one tensor. See `method.combine`."""
    kept = [keep_largest(delta, settings.density) for delta in deltas]
    return divided(weigh(kept, weights).sum(dim=0), weights, normalize=settings.normalize_or(False))

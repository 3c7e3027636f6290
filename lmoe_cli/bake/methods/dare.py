"""DARE: drop elements at random and rescale the rest, then add, or elect signs as TIES does.

    Yu et al. 2023, sec. 3                  https://arxiv.org/abs/2311.03099

The rest is scaled to the sum of magnitudes it had before, which in expectation is the paper's 1/density.
"""

from __future__ import annotations

from torch import Tensor

from lmoe_cli.bake.methods.method import Settings, divided, divided_by_agreement
from lmoe_cli.bake.methods.thinning import drop_at_random, weigh


def dare(deltas: list[Tensor], weights: list[float], settings: Settings) -> Tensor:
    """Combine task vectors of one tensor. See `method.combine`."""
    return divided(_thinned(deltas, weights, settings).sum(dim=0), weights, normalize=settings.normalize_or(False))


def dare_ties(deltas: list[Tensor], weights: list[float], settings: Settings) -> Tensor:
    """The same with an elected sign per element. See `method.combine`."""
    thinned = _thinned(deltas, weights, settings)
    return divided_by_agreement(thinned, weights, normalize=settings.normalize_or(False))


def _thinned(deltas: list[Tensor], weights: list[float], settings: Settings) -> Tensor:
    if settings.density >= 1:
        return weigh(deltas, weights)
    return weigh([drop_at_random(delta, settings.density, settings.generator) for delta in deltas], weights)

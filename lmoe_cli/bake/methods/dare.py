"""DARE: drop elements at random and rescale the rest, then add, or elect signs as TIES does.

    Yu et al. 2023, sec. 3                  https://arxiv.org/abs/2311.03099

The rest is scaled to the sum of magnitudes it had before, which in expectation is the paper's 1/density.
"""

from __future__ import annotations

from lmoe_cli.bake.methods.method import Method, Settings, Thin, Whole
from lmoe_cli.bake.methods.thinning import drop_at_random


def drop(whole: Whole, settings: Settings) -> Thin | None:
    """Drop elements with equal chances."""
    return drop_at_random(whole, lambda _: settings.density) if settings.density < 1 else None


DARE = Method(drop, elects_sign=False, normalizes=False)
DARE_TIES = Method(drop, elects_sign=True, normalizes=False)

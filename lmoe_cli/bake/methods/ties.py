"""TIES: trim each delta, elect a sign per element, and average those that agree with it.

Yadav et al. 2023, algorithm 1          https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from lmoe_cli.bake.methods.method import Method, Settings, Thin, Whole
from lmoe_cli.bake.methods.thinning import keep_largest


def trim(whole: Whole, settings: Settings) -> Thin | None:
    """Keep the largest elements of a delta."""
    return keep_largest(whole, settings.density)


TIES = Method(trim, elects_sign=True, normalizes=True)

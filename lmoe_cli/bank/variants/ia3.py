"""IA3: one learned factor per output, or per input of feed-forward modules.

    W' = diag(l) W   or   W diag(l)         Liu et al. 2022, eq. 4 and 5      https://arxiv.org/abs/2205.05638

A factor on outputs also acts on the bias.
"""

from __future__ import annotations

from lmoe_cli.bank.delta import Delta
from lmoe_cli.bank.variants.source import Contents


def ia3_delta(contents: Contents) -> Delta:
    """The delta of ``ia3_l``, (d_out, 1) or (1, d_in)."""
    factors = contents.read("ia3")
    change = factors.flatten() - 1.0
    if factors.shape[0] == 1 and factors.shape[1] != 1:
        return Delta(column=change)
    bias = contents.bias()
    return Delta(row=change, bias=None if bias is None else change * bias)

"""LoHa: the elementwise product of two low-rank products.

    dW = s (W1a W1b) * (W2a W2b)            Hyeon-Woo et al. 2021, prop. 1    https://arxiv.org/abs/2108.06098

Its rank is at most r^2, and the factors can be written down: each row of A is the elementwise product of a row of W1b
and one of W2b, each column of B that of a column of W1a and one of W2a. The conversion is exact.
"""

from __future__ import annotations

from lmoe_cli.bank.delta import Delta
from lmoe_cli.bank.variants.source import Contents


def loha_delta(contents: Contents) -> Delta:
    """The delta of ``hada_w1_a``, ``hada_w1_b``, ``hada_w2_a`` and ``hada_w2_b``."""
    w1a, w1b = contents.read("hada_w1_a"), contents.read("hada_w1_b")  # (d_out, r), (r, d_in)
    w2a, w2b = contents.read("hada_w2_a"), contents.read("hada_w2_b")
    a = (w1b[:, None, :] * w2b[None, :, :]).flatten(0, 1)  # (r^2, d_in)
    b = (w1a[:, :, None] * w2a[:, None, :]).flatten(1, 2)  # (d_out, r^2)
    return Delta(a, contents.scaling * b)

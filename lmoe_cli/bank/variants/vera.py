"""VeRA: learned scales on random projections that all modules share.

    dW = diag(b) B diag(d) A                Kopiczko et al. 2023, eq. 2       https://arxiv.org/abs/2310.11454

The shared projections are cut to the module's size. It is a low-rank product as it stands.
"""

from __future__ import annotations

from lmoe_cli.bank.delta import Delta
from lmoe_cli.bank.variants.source import Contents


def vera_delta(contents: Contents) -> Delta:
    """The delta of ``vera_lambda_b`` (d_out,), ``vera_lambda_d`` (r,) and the shared ``vera_A``, ``vera_B``."""
    scale_b, scale_d = contents.read("vera_lambda_b"), contents.read("vera_lambda_d")
    a = scale_d[:, None] * contents.read("vera_A")[:, : contents.d_in]
    b = scale_b[:, None] * contents.read("vera_B")[: scale_b.shape[0]]
    return Delta(a, b)

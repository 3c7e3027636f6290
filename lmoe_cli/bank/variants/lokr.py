"""LoKr: a Kronecker product of two small matrices, either of which may be a low-rank product.

    dW = s (W1 kron W2)                     Edalati et al. 2022, eq. 3        https://arxiv.org/abs/2212.10650

With W1 = U1 V1 and W2 = U2 V2 it is (U1 kron U2)(V1 kron V2), a low-rank product of rank r1 r2, exactly. A side that is
not factored is taken as U = W, V = 1 or the other way round, whichever is smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmoe_cli.bank.delta import Delta
from lmoe_cli.bank.variants.source import Contents


def lokr_delta(contents: Contents) -> Delta:
    """The delta of ``lokr_w1`` and ``lokr_w2``, each whole or as ``_a`` and ``_b``."""
    u1, v1 = _side(contents, "lokr_w1")
    u2, v2 = _side(contents, "lokr_w2")
    return Delta(torch.kron(v1, v2), contents.scaling * torch.kron(u1, u2))


def _side(contents: Contents, role: str) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (r, n) with U V the matrix of that side."""
    if not contents.has(role):
        return contents.read(f"{role}_a"), contents.read(f"{role}_b")
    matrix = contents.read(role)
    rows, columns = matrix.shape
    return (matrix, torch.eye(columns)) if columns <= rows else (torch.eye(rows), matrix)

"""The best low-rank approximation of a product B A, without forming it.

    B = Q_b R_b,  A' = Q_a R_a,  R_b R_a' = U S V'   gives   B A = (Q_b U) S (V' Q_a')

so the singular values of B A are those of a matrix of side R, and cutting it off is optimal.
    Eckart and Young 1936; the QR step as in Halko et al. 2011, sec. 5.1   https://arxiv.org/abs/0909.4061
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmoe_cli.errors import InvalidFileError


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Cut a product B A to a smaller rank.

    Args:
        a: A, (R, d_in), float32.
        b: B, (d_out, R), float32.
        rank: To keep; nothing is lost where the product has no more.

    Returns:
        A (rank, d_in), B (d_out, rank), and the Frobenius norm of what was cut, relative to that of B A.

    Raises:
        InvalidFileError: The product is larger than float32 can hold.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    inner = r_b @ r_a.T
    if not torch.isfinite(inner).all():
        hint = "smaller weights, or leave out the adapter that diverged"
        raise InvalidFileError("bake-overflow", "a blended delta is too large to be cut to a rank", hint=hint)
    u, s, vh = torch.linalg.svd(inner)
    kept = min(rank, s.shape[0])
    root = s[:kept].sqrt()
    total = torch.linalg.vector_norm(s)
    error = float(torch.linalg.vector_norm(s[kept:]) / total) if total > 0 else 0.0
    return root[:, None] * (vh[:kept] @ q_a.T), (q_b @ u[:, :kept]) * root, error


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with rows and columns of zeros up to a rank."""
    missing = rank - a.shape[0]
    return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)

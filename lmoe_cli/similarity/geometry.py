"""Inner products and subspaces of deltas, from their factors.

    <B_i A_i, B_j A_j> = sum of (B_i' B_j) * (A_i A_j')         * elementwise; no d_out x d_in matrix is formed
    cos(i, j)          = <dW_i, dW_j> / (|dW_i| |dW_j|)         Frobenius
    overlap(i, j)      = |Q_i' Q_j|^2 / min(r_i, r_j)           Hu et al. 2021, eq. 4    https://arxiv.org/abs/2106.09685

The overlap lies between 0 and 1 and measures how far the smaller subspace lies in the other: the mean of the squared
cosines of their principal angles. Hu et al. take Q from A alone. Here it spans the row space of B A (the input side) or
its column space (the output side), from a singular value decomposition between two QR decompositions, so a factor whose
partner is zero does not count and nothing depends on how the product is factored. Random subspaces of d dimensions
overlap by max(r_i, r_j) / d on average.

A delta with the base's matrix in it, D + B A with D = rho W + W kappa + (S - W), has no small form. Its inner products
are

    <D_i + B_i A_i, D_j + B_j A_j> = <D_i, D_j> + sum of (D_i A_j') * B_j + sum of (D_j A_i') * B_i + <B_i A_i, B_j A_j>

with D made for a few rows at a time. Everything is added up in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmoe_cli.bank.delta import ROW_BLOCK_ELEMENTS, Update

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding of float32 factors, and no direction of the delta."""


@dataclass(frozen=True)
class Spaces:
    """Orthonormal bases of what a low-rank change reads and writes, float64."""

    rows: Tensor
    """(m, r): of the rows of the change, as stored."""
    columns: Tensor
    """(n, r)."""

    @property
    def rank(self) -> int:
        return self.rows.shape[1]


def inner_products(changes: Sequence[Update], weight: Callable[[], Tensor]) -> Tensor:
    """All inner products of changes of one matrix.

    Args:
        changes: Of the matrix as it is stored.
        weight: Gives that matrix, (n, m), any float dtype. Called only where a change is more than low-rank.

    Returns:
        (k, k), float64.
    """
    found = _low_rank(changes)
    dense = [number for number, change in enumerate(changes) if not change.is_low_rank]
    if dense:
        found += _with_dense(changes, dense, weight())
    return found


def _low_rank(changes: Sequence[Update]) -> Tensor:
    """Inner products of the low-rank parts, (k, k), float64: one product over all experts per side."""
    low = [(number, *factors) for number, change in enumerate(changes) if (factors := _factors(change))]
    if not low:
        return torch.zeros(len(changes), len(changes), dtype=torch.float64)
    left = torch.cat([left for _, left, _ in low], dim=1)  # (n, R)
    right = torch.cat([right for _, _, right in low], dim=0)  # (R, m)
    owner = torch.zeros(left.shape[1], len(changes), dtype=torch.float64)  # (R, k)
    start = 0
    for number, own, _ in low:
        owner[start : start + own.shape[1], number] = 1.0
        start += own.shape[1]
    return owner.T @ ((left.T @ left) * (right @ right.T)) @ owner


def _with_dense(changes: Sequence[Update], dense: Sequence[int], matrix: Tensor) -> Tensor:
    """What parts that have the base's matrix in them add to inner products, (k, k), float64."""
    found = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    low = {number: factors for number, change in enumerate(changes) if (factors := _factors(change))}
    rest = {number: replace(changes[number], left=None, right=None) for number in dense}
    step = max(1, ROW_BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        own = {number: change.change(matrix[rows], rows).double() for number, change in rest.items()}
        for one, block in own.items():
            for two, other in own.items():
                found[one, two] += (block * other).sum()
            for two, (left, right) in low.items():
                product = ((block @ right.T) * left[rows]).sum()
                found[one, two] += product
                found[two, one] += product
    return found


def spaces(change: Update) -> Spaces:
    """The subspaces of the low-rank part of a change, each of its numerical rank; empty where there is none."""
    factors = _factors(change)
    if factors is None:
        empty = torch.zeros(0, 0, dtype=torch.float64)
        return Spaces(empty, empty)
    left, right = factors
    columns, outer = torch.linalg.qr(left)  # (n, p), (p, R)
    rows, inner = torch.linalg.qr(right.T)  # (m, q), (q, R)
    u, values, vh = torch.linalg.svd(outer @ inner.T, full_matrices=False)  # (p, t), (t,), (t, q)
    rank = int((values > RANK_TOLERANCE * values[:1]).sum())
    return Spaces(rows @ vh[:rank].T, columns @ u[:, :rank])


def nearness(one: Tensor, two: Tensor) -> float:
    """|Q_1' Q_2|^2, from 0 to the smaller rank.

    Args:
        one: (d, r_1), with orthonormal columns.
        two: (d, r_2), the same.
    """
    return float((one.T @ two).square().sum()) if one.numel() and two.numel() else 0.0


def _factors(change: Update) -> tuple[Tensor, Tensor] | None:
    """(n, R) and (R, m), float64."""
    if change.left is None or change.right is None:
        return None
    return change.left.double(), change.right.double()

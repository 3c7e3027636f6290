"""What one expert does to one matrix of the base, and how a blend of that changes the matrix.

Whatever an adapter holds becomes a row scale, a column scale, a low-rank product, a matrix to move towards, or a bias:

    dW_e = rho_e W + W kappa_e + B_e A_e + (S_e - W)
    W'   = W + sum_e g_e dW_e

with rho and kappa as diagonals. Every experts' terms add up; factors are never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROW_BLOCK_ELEMENTS = 1 << 20
"""Elements of the matrix that are changed at a time: small enough for the cache, large enough for the product."""


@dataclass(frozen=True)
class Delta:
    """What one expert does to one matrix W (d_out, d_in), with its own scaling folded in. Float32 but for ``saved``."""

    a: Tensor | None = None
    """A, (R, d_in)."""
    b: Tensor | None = None
    """s B, (d_out, R); for DoRA c s B."""
    row: Tensor | None = None
    """rho, (d_out,): c - 1 for DoRA, l - 1 for IA3 on outputs."""
    column: Tensor | None = None
    """kappa, (d_in,): l - 1 for IA3 on inputs."""
    saved: Tensor | None = None
    """S, the matrix the expert brings in place of W, laid out as W is stored, in the dtype it was saved in."""
    bias: Tensor | None = None
    """Change of the bias, (d_out,)."""

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    def scaled(self, factor: float) -> Delta:
        """The same change, ``factor`` times as strong; a saved matrix cannot be scaled here.

        Raises:
            ValueError: There is a saved matrix and ``factor`` is not 1.
        """
        if factor == 1.0:
            return self
        if self.saved is not None:
            raise ValueError("a saved matrix is weighted by its gate, not by scaling it")

        def times(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor * factor

        return Delta(self.a, times(self.b), times(self.row), times(self.column), None, times(self.bias))


@dataclass(frozen=True)
class Term:
    """One expert's part in a matrix."""

    expert: int
    """Its number among the gates."""
    delta: Delta
    """With the recipe's factor for this matrix folded in, but for a saved matrix."""
    factor: float = 1.0
    """The recipe's factor for a saved matrix. Dimensionless."""


@dataclass(frozen=True)
class Update:
    """A weighted sum of deltas, ready to be applied to blocks of rows of the stored matrix."""

    left: Tensor | None
    """(n, sum of R), gates folded in; n rows of the matrix as it is stored."""
    right: Tensor | None
    """(sum of R, m)."""
    row: Tensor | None
    """Factor on each stored row, less 1, (n,)."""
    column: Tensor | None
    """Added to the factor on each stored column, (m,)."""
    keep: float
    """1 less the gates of saved matrices: how much of W stays."""
    saved: tuple[tuple[float, Tensor], ...]
    """Gate and matrix, as stored."""

    def add_to(self, rows: Tensor, start: int) -> None:
        """Change rows ``start`` to ``start + len(rows)`` in place.

        Args:
            rows: As stored, (k, m), float32, so that the caller rounds once.
            start: Number of the first of them.
        """
        own = slice(start, start + rows.shape[0])
        if self.column is not None:
            scale = self.keep + self.column[None, :]
            rows *= scale if self.row is None else scale + self.row[own, None]
        elif self.row is not None:
            rows *= (self.keep + self.row[own])[:, None]
        elif self.keep != 1.0:
            rows *= self.keep
        if self.left is not None and self.right is not None:
            rows.addmm_(self.left[own], self.right)
        for gate, matrix in self.saved:
            rows.add_(matrix[own].to(torch.float32).view_as(rows), alpha=gate)

    def block(self, weight: Tensor, start: int) -> Tensor:
        """The changed rows from ``start`` on, (k, m), float32, of rows as they are stored, in any float dtype."""
        result = weight.to(torch.float32, copy=True)
        self.add_to(result, start)
        return result

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a product of two factors and nothing else."""
        return self.left is not None and self.row is None and self.column is None and self.keep == 1.0

    @property
    def norm(self) -> float | None:
        """Frobenius norm of a low-rank change, which needs no matrix: that of B A is the root of sum (B'B) (A A').

        None for any other.
        """
        if not self.is_low_rank or self.left is None or self.right is None:
            return None
        inner = (self.left.T @ self.left).double() * (self.right @ self.right.T).double()
        return math.sqrt(max(0.0, float(inner.sum())))

    def change(self, weight: Tensor | None, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """The change alone, W' - W, of some rows.

        Args:
            weight: Those rows as stored, (k, m), any float dtype; None where `is_low_rank`.
            rows: Which they are.
            out: Where to put it, (k, m), float32; fresh memory when None.

        Returns:
            (k, m), float32.
        """
        if self.is_low_rank and self.left is not None and self.right is not None:
            return torch.mm(self.left[rows], self.right, out=out)
        assert weight is not None, "only a low-rank change does without"
        result = torch.empty(weight.shape, dtype=torch.float32) if out is None else out
        if self.left is not None and self.right is not None:
            torch.mm(self.left[rows], self.right, out=result)
        else:
            result.zero_()
        if self.row is not None or self.column is not None or self.keep != 1.0:
            scale = torch.full_like(result[:, :1], self.keep - 1.0)
            scale = scale if self.row is None else scale + self.row[rows, None]
            scale = scale if self.column is None else scale + self.column[None, :]
            result.addcmul_(weight.to(torch.float32), scale)
        for gate, matrix in self.saved:
            result.add_(matrix[rows].to(torch.float32).view_as(result), alpha=gate)
        return result

    def to(self, device: torch.device) -> Update:
        """The same on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        saved = tuple((gate, matrix.to(device)) for gate, matrix in self.saved)
        return Update(moved(self.left), moved(self.right), moved(self.row), moved(self.column), self.keep, saved)

    def apply_(self, weight: Tensor, out: Tensor) -> None:
        """Write the changed matrix, rounded once to the dtype of ``out``.

        Args:
            weight: W as stored, (n, m).
            out: Same shape, any float dtype; may be ``weight`` itself.
        """
        step = min(weight.shape[0], max(1, ROW_BLOCK_ELEMENTS // max(1, weight.shape[1])))
        held = torch.empty(step, weight.shape[1], device=weight.device)
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step]
            changed = held[: len(rows)].copy_(rows)
            self.add_to(changed, start)
            out[start : start + step].copy_(changed)


def update(terms: Sequence[tuple[float, Delta]], *, transposed: bool) -> Update | None:
    """Add up weighted deltas of one matrix.

    Args:
        terms: Gate and delta of each expert.
        transposed: The matrix is stored as (d_in, d_out).

    Returns:
        The update, or None where it changes nothing.
    """
    live = [(gate, delta) for gate, delta in terms if gate != 0.0]
    low = [(gate, delta) for gate, delta in live if delta.a is not None and delta.b is not None]
    rows = _sum((gate, delta.row) for gate, delta in live)
    columns = _sum((gate, delta.column) for gate, delta in live)
    saved = tuple((gate, delta.saved) for gate, delta in live if delta.saved is not None)
    if not low and rows is None and columns is None and not saved:
        return None
    left = right = None
    if low:
        b = torch.cat([delta.b * gate for gate, delta in low if delta.b is not None], dim=1)  # (d_out, R)
        a = torch.cat([delta.a for _, delta in low if delta.a is not None], dim=0)  # (R, d_in)
        left, right = (a.T.contiguous(), b.T.contiguous()) if transposed else (b, a)
    if transposed:
        rows, columns = columns, rows
    return Update(left, right, rows, columns, 1.0 - sum(gate for gate, _ in saved), saved)


def bias_update(terms: Sequence[tuple[float, Delta]]) -> Tensor | None:
    """The weighted sum of bias changes, (d_out,), float32; None where there is none."""
    return _sum((gate, delta.bias) for gate, delta in terms if gate != 0.0)


def _sum(terms: object) -> Tensor | None:
    total: Tensor | None = None
    for gate, tensor in terms:  # type: ignore[attr-defined]
        if tensor is not None:
            total = gate * tensor if total is None else total.add(tensor, alpha=gate)
    return total

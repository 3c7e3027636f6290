"""What experts bring to modules that share one input, and which of it the kernels can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe_cli.bank.fused.tiles import MAX_BATCH

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Factors:
    """The low-rank deltas of all experts on modules that share one input, its members."""

    a: Tensor
    """Stacked over members and experts, (R, d_in), contiguous along d_in."""
    b: tuple[Tensor, ...]
    """One per member, (d_out, its R), any strides; (d_out, 0) for one without experts. In the dtype of ``a``."""
    starts: tuple[int, ...]
    """Row of ``a`` where the first column of each belongs; the others follow it."""


@dataclass(frozen=True)
class Table:
    """Where experts are in a stacked A."""

    places: Tensor
    """First row of A, and rank, of each expert on each member, (2, M, E), int32; rank 0 where a member lacks it."""
    max_rank: int
    """The largest of these ranks."""

    @staticmethod
    def of(layouts: Sequence[Sequence[tuple[int, int]]], experts: int, device: torch.device | str) -> Table:
        """From what is known when A is stacked.

        Args:
            layouts: For each member in turn, expert and rank of each run of rows of A.
            experts: E, of the loadout.
            device: Where the kernels read it.

        Raises:
            ValueError: An expert has two runs of rows on one member, or is not among the loadout's.
        """
        firsts, ranks = ([[0] * experts for _ in layouts] for _ in range(2))
        row = 0
        for member, layout in enumerate(layouts):
            for expert, rank in layout:
                if not 0 <= expert < experts:
                    raise ValueError(f"there are {experts} experts, got number {expert}")
                if ranks[member][expert]:
                    raise ValueError(f"expert {expert} has two runs of rows on member {member}")
                firsts[member][expert], ranks[member][expert] = row, rank
                row += rank
        largest = max((rank for own in ranks for rank in own), default=0)
        return Table(torch.tensor([firsts, ranks], dtype=torch.int32, device=device), largest)


@dataclass(frozen=True)
class Chosen:
    """Experts chosen per vector, known to the device alone."""

    experts: Tensor
    """Of each vector, (N, K), int32 or int64, contiguous. A number outside [0, E) is an expert that adds nothing."""
    gates: Tensor
    """Theirs, (N, K), any float dtype, contiguous."""
    table: Table


def check(x: Tensor, factors: Factors, gates: Tensor | Chosen) -> None:
    """Raise ValueError unless vectors, factors and gates fit each other and the kernels."""
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_BATCH or x.dtype not in DTYPES:
        raise ValueError(f"x must be 1 to {MAX_BATCH} vectors in a float dtype of 16 or 32 bits, got {words(x)}")
    check_matrix("x", x, tuple(x.shape), x, x.dtype)
    rank = len(factors.a) if factors.a.dim() else 0
    check_matrix("A", factors.a, (rank, x.shape[1]), x, x.dtype)
    if not factors.b or len(factors.b) != len(factors.starts):
        raise ValueError(f"{len(factors.b)} members, but {len(factors.starts)} starts")
    for b, start in zip(factors.b, factors.starts, strict=True):
        if b.dim() != 2 or b.dtype != x.dtype or b.device != x.device:
            raise ValueError(f"B must be (d_out, R) in {x.dtype} on {x.device}, got {words(b)}")
        if not 0 <= start <= start + b.shape[1] <= rank:
            raise ValueError(f"A has {rank} rows, but a member has those from {start} to {start + b.shape[1]}")
    if isinstance(gates, Chosen):
        _check_chosen(x, factors, gates)
        return
    rows = len(gates) if gates.dim() else 0
    check_matrix("gates", gates, (rows, rank), x, None)
    if gates.dtype not in (torch.float32, x.dtype) or not rows or x.shape[0] % rows:
        raise ValueError(f"{x.shape[0]} vectors in {x.dtype} cannot carry gates of {words(gates)}")


def _check_chosen(x: Tensor, factors: Factors, gates: Chosen) -> None:
    chosen, places = gates.experts, gates.table.places
    shape = (x.shape[0], chosen.shape[-1] if chosen.dim() else 0)
    if chosen.shape != shape or not shape[1] or chosen.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"chosen experts must be ({x.shape[0]}, K), int32 or int64, got {words(chosen)}")
    if gates.gates.shape != shape or not gates.gates.is_floating_point():
        raise ValueError(f"gates of chosen experts must be {shape}, in a float dtype, got {words(gates.gates)}")
    if places.dim() != 3 or places.shape[:2] != (2, len(factors.b)) or places.dtype != torch.int32:
        raise ValueError(f"the table must be (2, {len(factors.b)}, E), int32, got {words(places)}")
    if any(not own.is_contiguous() or own.device != x.device for own in (chosen, gates.gates, places)):
        raise ValueError(f"chosen experts, their gates and the table must be contiguous and on {x.device}")
    if gates.table.max_rank < 1:
        raise ValueError(f"the largest rank must be at least 1, got {gates.table.max_rank}")


def check_matrix(name: str, matrix: Tensor, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless a matrix has the shape, contiguous rows, the device of x, and the dtype, or any float."""
    fits = matrix.shape == shape and matrix.device == x.device and (matrix.stride(1) == 1 or matrix.shape[1] <= 1)
    if not fits or (matrix.dtype != dtype if dtype is not None else not matrix.is_floating_point()):
        kind = "a float dtype" if dtype is None else dtype
        raise ValueError(f"{name} must be {shape} in {kind} on {x.device}, rows contiguous, got {words(matrix)}")


def words(tensor: Tensor) -> str:
    """A tensor's outside, for a message."""
    return f"{tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"

"""Experts whose gates are zero cost nothing: the products of those that act, on the vectors that they act on.

    y[i] += B_e ( g_ie A_e x[i] )        for every vector i and every expert e with g_ie other than 0

With gates per token the vectors of one expert are taken together, so there are as many small products as experts that
act, and the memory beside the gates is that of one block of vectors. Where few experts are left out it is quicker to
compute with all of them at once; which way is taken follows from the times measured below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates, Share
from lmoe_cli.bank.product import Products

BLOCK = 512
"""Vectors that are taken together at most."""


class Piece(NamedTuple):
    """Where one expert's factors of one module stand."""

    rows: slice
    """Of the stacked A."""
    columns: slice
    """Of the module's B."""

    @property
    def rank(self) -> int:
        return int(self.rows.stop - self.rows.start)


class Speed(NamedTuple):
    """What decides between all experts at once and one after the other, measured on two cores in float32."""

    bytes_s: float = 15e9
    """Reading of factors."""
    flops_s: float = 100e9
    """Products of many vectors with all experts' factors."""
    thin_flops_s: float = 50e9
    """The same with those of one expert."""
    call_s: float = 8e-6
    """Start of one product or one movement of vectors."""


SPEED = Speed()


@dataclass(frozen=True)
class Member:
    """One of the modules that read the same input."""

    d_out: int
    pieces: Mapping[int, tuple[Piece, ...]]
    """Expert → where its factors stand; in several places where its adapter names the module in several ways."""

    @staticmethod
    def of(terms: Sequence[Term], start: int) -> Member:
        """What a module brings to the stack.

        Args:
            terms: With low-rank deltas, at least one.
            start: Where the module's part of the stacked A begins.
        """
        found: dict[int, tuple[Piece, ...]] = {}
        column = 0
        for term in terms:
            end = column + term.delta.rank
            piece = Piece(slice(start + column, start + end), slice(column, end))
            found[term.expert] = (*found.get(term.expert, ()), piece)
            column = end
        b = terms[0].delta.b
        assert b is not None, "a low-rank delta has both factors"
        return Member(b.shape[0], found)

    def rank_of(self, expert: int) -> int:
        """Rank of an expert here; 0 where it does nothing."""
        return sum(piece.rank for piece in self.pieces.get(expert, ()))


def is_worth(gates: Gates, x: Tensor, members: tuple[Member, ...], speed: Speed = SPEED) -> bool:
    """Whether computing only with the experts that act is quicker than with all.

    Args:
        gates: Of the model.
        x: Input of the modules, (..., d_in).
        members: The modules.
        speed: Of the machine.
    """
    key = ("worth", x.shape, id(members))
    return gates.derived(key, lambda: (_is_less(gates, x, members, speed),))[0]


def _is_less(gates: Gates, x: Tensor, members: Sequence[Member], speed: Speed) -> bool:
    d_in, size = x.shape[-1], x.element_size()
    count = x.numel() // d_in
    dense = sparse = 0.0
    for member in members:
        width = d_in + member.d_out
        rank = sum(member.rank_of(expert) for expert in member.pieces)
        dense += rank * width * size / speed.bytes_s + 2 * count * rank * width / speed.flops_s + 2 * speed.call_s
        for share in gates.shares(x):
            if (part := member.rank_of(share.expert)) > 0:
                own = count if share.vectors is None else len(share.vectors)
                moved = 0 if share.vectors is None else own * (d_in + 3 * member.d_out) * size
                calls = 2 if share.vectors is None else 5
                sparse += (part * width * size + moved) / speed.bytes_s
                sparse += 2 * own * part * width / speed.thin_flops_s + calls * speed.call_s
    return sparse < dense


def add_shares(y: Tensor, x: Tensor, a: Tensor, b: Tensor, member: Member, gates: Gates, products: Products) -> Tensor:
    """Add what the experts that act do, each to the vectors on which it acts.

    Args:
        y: Output of the base, (..., d_out), any float dtype; changed in place where it is of the dtype of B.
        x: Input, (..., d_in).
        a: The stacked A, (sum of R, d_in).
        b: B of the module, (d_out, R).
        member: Which module.
        gates: Of the model.
        products: Kernels to use.

    Returns:
        (..., d_out), in the dtype of ``y``.
    """
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    for share in gates.shares(x):
        for piece in member.pieces.get(share.expert, ()):
            flat_y = _add(flat_y, flat_x, a[piece.rows], b[:, piece.columns], share, products)
    return flat_y.view(y.shape)


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, share: Share, products: Products) -> Tensor:
    gates = share.gates.to(a.dtype)
    if share.vectors is None:
        return products.add(y, products(x.to(a.dtype), a) * gates, b)
    for vectors, own in zip(share.vectors.split(BLOCK), gates.split(BLOCK), strict=True):  # type: ignore[no-untyped-call]
        low = F.linear(x[vectors].to(a.dtype), a) * own  # (n, R)
        y = y.index_add_(0, vectors, torch.mm(low, b.T).to(y.dtype))
    return y

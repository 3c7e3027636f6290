"""Experts whose gates are zero cost nothing: the products of those that act, on the vectors that they act on.

    y[i] += B_e ( g_ie A_e x[i] )        for every vector i and every expert e with g_ie other than 0

With gates per token the vectors of one expert are taken together, and several experts with theirs at a time where all
ranks are equal. Beside the gates that needs the memory of one block of vectors. Where few experts are left out it is
quicker to compute with all of them at once; which way is taken follows from the times measured below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates, Share
from lmoe_cli.bank.product import Products
from lmoe_cli.bank.stacked import StackedB

BLOCK = 1024
"""Vectors that are taken together at most, but for those of a single expert."""


class Piece(NamedTuple):
    """Where one expert's factors of one module stand."""

    rows: slice
    """Of the stacked A."""
    columns: slice
    """Of the module's B."""

    @property
    def rank(self) -> int:
        return int(self.rows.stop - self.rows.start)


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

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Expert → its rank here."""
        return {expert: sum(piece.rank for piece in own) for expert, own in self.pieces.items()}

    @cached_property
    def total(self) -> int:
        """Sum of all ranks."""
        return sum(self.ranks.values())

    @cached_property
    def rank(self) -> int | None:
        """The rank of all experts, each in one place; None where that is not so."""
        ranks = {piece.rank for own in self.pieces.values() for piece in own}
        return ranks.pop() if len(ranks) == 1 and all(len(own) == 1 for own in self.pieces.values()) else None


class Speed(NamedTuple):
    """What decides between all experts at once and those that act, measured on two cores of an AMD EPYC."""

    flops_s: float
    """Products of many vectors with all experts' factors."""
    thin_flops_s: float
    """The same with those of the experts that act."""
    call_s: float
    """Start of a product of many vectors, or of one movement of them."""


SPEEDS = {torch.float32: Speed(95e9, 50e9, 10e-6)}
SPEED_16_BIT = Speed(300e9, 80e9, 25e-6)
BYTES_S = 15e9
"""Reading of factors, and movement of vectors."""
ONE_CALL_S = 8e-6
"""Start of a product with one vector."""


def is_worth(gates: Gates, x: Tensor, members: tuple[Member, ...]) -> bool:
    """Whether computing only with the experts that act is quicker than with all.

    Args:
        gates: Of the model.
        x: Input of the modules, (..., d_in).
        members: The modules.
    """
    key = ("worth", x.shape, id(members))
    return gates.derived(key, lambda: (_is_less(gates, x, members),))[0]


def _is_less(gates: Gates, x: Tensor, members: Sequence[Member]) -> bool:
    speed = SPEEDS.get(x.dtype, SPEED_16_BIT)
    d_in, size = x.shape[-1], x.element_size()
    count = x.numel() // d_in
    call_s = ONE_CALL_S if count == 1 else speed.call_s
    with torch.no_grad():  # only counted, once, however often the module is computed
        shares = gates.shares(x)
    dense = sparse = 0.0
    for member in members:
        width = d_in + member.d_out
        dense += member.total * (width * size / BYTES_S + 2 * count * width / speed.flops_s) + 2 * call_s
        acting = read = work = pairs = 0
        for share in shares:
            if rank := member.ranks.get(share.expert, 0):
                own = count if share.vectors is None else len(share.vectors)
                acting, read, work = acting + 1, read + rank, work + own * rank
                pairs += 0 if share.vectors is None else own
        starts = 2 * acting if not pairs else 5 * (1 + pairs // BLOCK if member.rank else acting)
        moved = pairs * (d_in + 3 * member.d_out)
        sparse += (read * width + moved) * size / BYTES_S + 2 * work * width / speed.thin_flops_s + starts * call_s
    return sparse < dense


def add_shares(
    y: Tensor, x: Tensor, a: Tensor, b: StackedB, member: Member, gates: Gates, products: Products
) -> Tensor:
    """Add what the experts that act do, each to the vectors on which it acts.

    Args:
        y: Output of the base, (..., d_out), any float dtype; changed in place where it is of the dtype of B.
        x: Input, (..., d_in).
        a: The stacked A, (sum of R, d_in).
        b: B of the module.
        member: Which module.
        gates: Of the model.
        products: Kernels to use.

    Returns:
        (..., d_out), in the dtype of ``y``.
    """
    flat_x, flat_y = x.reshape(-1, x.shape[-1]).to(a.dtype), y.reshape(-1, y.shape[-1])
    shares = gates.shares(x)
    if member.rank and any(share.vectors is not None for share in shares):
        _add_blocks(flat_y, flat_x, a, b, member, _blocks(gates, x, tuple(member.pieces)))
        return flat_y.view(y.shape)
    for share in shares:
        for piece in member.pieces.get(share.expert, ()):
            flat_y = _add(flat_y, flat_x, a[piece.rows], b.of(piece.columns), share, products)
    return flat_y.view(y.shape)


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, share: Share, products: Products) -> Tensor:
    """Add what one expert does."""
    gates = share.gates.to(a.dtype)
    if share.vectors is None:
        return products.add(y, products(x, a) * gates, b)
    for vectors, own in zip(share.vectors.split(BLOCK), gates.split(BLOCK), strict=True):  # type: ignore[no-untyped-call]
        low = products(x.index_select(0, vectors), a) * own  # (n, R)
        y.index_add_(0, vectors, torch.mm(low, b.T).to(y.dtype))
    return y


class _Block(NamedTuple):
    """Some experts and the vectors on which they act, as many for each."""

    experts: slice
    """Their places in the stack."""
    vectors: Tensor
    """(G, n), int64; an expert that acts on fewer has the first vector in their place."""
    gates: Tensor
    """(G, n, 1), float32; 0 for those."""


def _blocks(gates: Gates, x: Tensor, experts: tuple[int, ...]) -> tuple[_Block, ...]:
    if gates.values.requires_grad:
        return tuple(_make_blocks(gates, x, experts))
    return gates.derived(("blocks", x.shape[:-1], experts), lambda: tuple(_make_blocks(gates, x, experts)))


def _make_blocks(gates: Gates, x: Tensor, experts: tuple[int, ...]) -> list[_Block]:
    acting = {share.expert: share for share in gates.shares(x)}
    nothing = Share(-1, torch.empty(0, dtype=torch.long, device=x.device), torch.empty(0, 1, device=x.device))
    own = [acting.get(expert, nothing) for expert in experts]
    counts = [0 if share.vectors is None else len(share.vectors) for share in own]
    found: list[_Block] = []
    start = 0
    for stop in range(1, len(own) + 1):
        if stop < len(own) and max(counts[start : stop + 1]) * (stop + 1 - start) <= BLOCK:
            continue
        if any(counts[start:stop]):
            vectors = pad_sequence([share.vectors for share in own[start:stop] if share.vectors is not None], True)
            factors = pad_sequence([share.gates for share in own[start:stop]], True)
            found.append(_Block(slice(start, stop), vectors, factors))
        start = stop
    return found


def _add_blocks(y: Tensor, x: Tensor, a: Tensor, b: StackedB, member: Member, blocks: Sequence[_Block]) -> None:
    first = next(iter(member.pieces.values()))[0].rows.start
    rank, count = member.rank or 0, len(member.pieces)
    every_a = a[first : first + count * rank].view(count, rank, -1).transpose(1, 2)  # (E, d_in, R)
    every_b = b.each()  # (E, R, d_out)
    for block in blocks:
        vectors = block.vectors.flatten()
        taken = x.index_select(0, vectors).view(*block.vectors.shape, -1)  # (G, n, d_in)
        low = torch.bmm(taken, every_a[block.experts]) * block.gates.to(a.dtype)  # (G, n, R)
        y.index_add_(0, vectors, torch.bmm(low, every_b[block.experts]).flatten(0, 1).to(y.dtype))

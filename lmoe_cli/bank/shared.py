"""The stacked A of all experts on modules that read the same input, and the one product with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates, Share
from lmoe_cli.bank.product import Products
from lmoe_cli.bank.sparse import Member, is_worth
from lmoe_cli.bank.stacked import StackedB

T = TypeVar("T")


class Latest:
    """What modules with the same input share at present: at most one result in a whole model.

    Activations of a whole prompt are large. A result is dropped when all who share it have asked, and by the next one
    where some did not ask or brought another input.
    """

    __slots__ = ("input", "result", "site", "waiting")

    def __init__(self) -> None:
        self.site: object = None
        self.input: Tensor | None = None
        self.result: Any = None
        self.waiting = 0
        """How many members have not asked yet."""

    def share(self, site: object, x: Tensor, asking: int, compute: Callable[[Tensor], T]) -> T:
        """The result for an input, computed for the first member that asks.

        Args:
            site: Whose members share it.
            x: The input. Members called with the same tensor share the result.
            asking: How many members ask.
            compute: Makes the result.
        """
        if x is not self.input or site is not self.site:
            result = compute(x)
            if asking == 1:
                return result
            self.site, self.input, self.result, self.waiting = site, x, result, asking
        found: T = self.result
        self.waiting -= 1
        if self.waiting == 0:
            self.site = self.input = self.result = None
        return found


class SharedInput(nn.Module):
    """The stacked A of all experts on all modules that read one input, and the one product with it.

    Args:
        gates: Of the model.
        latest: Of the model.
        members: Terms with low-rank deltas of each module.
        dtype: Of A and of the product.
        device: Of the modules.
        products: Kernels to use.
    """

    a: Tensor
    owner: Tensor

    def __init__(
        self,
        gates: Gates,
        latest: Latest,
        members: Sequence[Sequence[Term]],
        dtype: torch.dtype,
        device: torch.device,
        products: Products,
    ) -> None:
        super().__init__()
        self.gates = gates
        self.latest = latest
        self.products = products
        self.experts = [frozenset(term.expert for term in terms) for terms in members]
        low = [[term for term in terms if term.delta.a is not None] for terms in members]
        stacked = [term.delta.a for terms in low for term in terms if term.delta.a is not None]
        self.register_buffer("a", torch.cat(stacked).to(device, dtype))  # (sum of R, d_in)
        ranks = [(term.expert, term.delta.rank) for terms in low for term in terms]
        self.layout = tuple(ranks)
        owner = [expert for expert, rank in ranks for _ in range(rank)]
        self.register_buffer("owner", torch.tensor(owner, device=device))
        ends = torch.tensor([sum(term.delta.rank for term in terms) for terms in low]).cumsum(0).tolist()
        self.bounds = list(zip([0, *ends], ends, strict=False))
        self.members = tuple(Member.of(terms, start) for terms, (start, _) in zip(low, self.bounds, strict=True))
        """What each module brings to the stack."""
        gates.coefficients(self.layout, self.owner, dtype)  # from now on, so that compiled code finds them
        self._stacks: Sequence[StackedB] = ()
        self._ranks = [stop - start for start, stop in self.bounds]
        self._transposed = self.a.T
        self._are_even = all(member.rank and len(member.pieces) == gates.count for member in self.members)
        self._decided: dict[int, bool] = {}
        self._version = -1
        self._vector: Tensor | None = None
        self._few: list[Share] | None = None

    def use(self, stacks: Sequence[StackedB]) -> None:
        """Get to know the B of each member, in their order."""
        self._stacks = tuple(stacks)
        self._transposed = self.a.T

    def factors(self, expert: int) -> list[tuple[Tensor, Tensor]]:
        """A (r, d_in) and B (d_out, r) of an expert on each member that it changes, as they are computed with."""
        return [
            (self.a[piece.rows], b.of(piece.columns))
            for member, b in zip(self.members, self._stacks, strict=True)
            for piece in member.pieces.get(expert, ())
        ]

    def is_sparse(self, x: Tensor) -> bool:
        """Whether the members had better compute only with the experts that act; the same for all of them."""
        if torch.compiler.is_compiling():
            return False
        return self.gates.are_sparse and is_worth(self.gates, x, self.members)

    def low(self, x: Tensor, member: int) -> Tensor:
        """The gated low-rank activations of one member.

        Args:
            x: Its input, (..., d_in). Members called with the same tensor share the product.
            member: Which module asks.

        Returns:
            g A x, (..., R of that module).
        """
        low = self.latest.share(self, x, self.asking, self._product)
        if len(self.bounds) == 1:
            return low
        start, stop = self.bounds[member]
        return low[..., start:stop]

    def is_for_one(self, x: Tensor, member: int) -> bool:
        """Whether `add_one` is the way to go for a member: some expert acts there, and the batch has the same gates.

        Args:
            x: (..., d_in), one vector, in the dtype of A.
            member: Which module.
        """
        if self._version != self.gates.version:
            self._look_at_gates(x)
        return self._acts[member] and (self._vector is not None or self._few is not None)

    def add_one(self, y: Tensor, x: Tensor, member: int, b: StackedB) -> None:
        """Add the low-rank part of a member to y, on the shortest way: a token asks for it hundreds of times.

        Args:
            y: (..., d_out), what the base gives for it; changed in place.
            x: As in `is_for_one`.
            member: As there.
            b: Its B.
        """
        if self._few is None:
            low = self.latest.share(self.members, x, self._waiting, self._one)[member]
            b.add_one(y.view(1, -1), low, self.products)
            return
        pieces, a = self.members[member].pieces, self._transposed
        parts = [
            (a[:, piece.rows], share.gates, b.of(piece.columns).T)
            for share in self._few
            for piece in pieces.get(share.expert, ())
        ]
        self.products.add_few(y.view(1, -1), x.view(1, -1), parts)

    def _one(self, x: Tensor) -> Sequence[Tensor]:
        assert self._vector is not None, "it was looked at"
        low = self.products.one(x.view(1, -1), self.a, None).mul_(self._vector)
        return low.split(self._ranks, 1) if len(self._ranks) > 1 else (low,)  # type: ignore[no-untyped-call]

    def _look_at_gates(self, x: Tensor) -> None:
        gates = self.gates
        self._version, self._vector, self._few = gates.version, None, None
        self._acts = [gates.is_active(experts) for experts in self.experts]
        self._waiting = sum(self._acts)
        if gates.values.numel() != gates.values.shape[-1] or gates.values.requires_grad:
            return
        if self._is_sparse_for_one(x):
            dtype = self.a.dtype
            made = lambda: [Share(share.expert, None, share.gates.to(dtype)) for share in gates.shares(x)]  # noqa: E731
            self._few = gates.derived(("few", dtype), made)
        else:
            self._vector = gates.coefficients(self.layout, self.owner, self.a.dtype).view(-1)

    def _is_sparse_for_one(self, x: Tensor) -> bool:
        """See `is_sparse`. Where all ranks are equal, one vector leaves only the number of experts to decide on."""
        if not self._are_even:
            return self.is_sparse(x)
        count = len(self.gates.active)
        if count not in self._decided:
            self._decided[count] = self.is_sparse(x)
        return self._decided[count]

    def coefficients(self, low: Tensor) -> Tensor:
        """The gate of each row of A, broadcasting against ``low`` (..., sum of R), in the dtype of A."""
        return self.gates.spread(self.gates.coefficients(self.layout, self.owner, self.a.dtype), low)

    @property
    def asking(self) -> int:
        """How many members ask under the present gates; the others leave their base's output as it is."""
        return self.gates.derived(id(self), self._asking)

    def _product(self, x: Tensor) -> Tensor:
        a = self.a
        low = self.products.down(x if x.dtype == a.dtype else x.to(a.dtype), a)  # (..., sum of R)
        gates = self.coefficients(low)
        return low * gates if torch.is_grad_enabled() else low.mul_(gates)

    def _asking(self) -> int:
        return sum(self.gates.is_active(experts) for experts in self.experts)

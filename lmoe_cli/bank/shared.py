"""The stacked A of all experts on modules that read the same input, and the one product with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.product import Products
from lmoe_cli.bank.sparse import Member, is_worth


class Latest:
    """The product that modules with the same input share at present: at most one in a whole model.

    Activations of a whole prompt are large. A product is dropped when all who share it have asked, and by the next
    one where some did not ask or brought another input.
    """

    __slots__ = ("input", "low", "site", "waiting")

    def __init__(self) -> None:
        self.site: SharedInput | None = None
        self.input: Tensor | None = None
        self.low: Tensor | None = None
        """g A x of all members, (..., sum of R)."""
        self.waiting = 0
        """How many members have not asked yet."""


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
        start, stop = self.bounds[member]
        latest = self.latest
        if x is not latest.input or self is not latest.site:
            low = self._product(x)
            if len(self.bounds) == 1:
                return low
            asking = self.gates.derived(id(self), self._asking)
            latest.site, latest.input, latest.low, latest.waiting = self, x, low, asking
        assert latest.low is not None, "it comes with its input"
        result = latest.low[..., start:stop]
        latest.waiting -= 1
        if latest.waiting == 0:
            latest.site = latest.input = latest.low = None
        return result

    def _product(self, x: Tensor) -> Tensor:
        a = self._buffers["a"]
        owner = self._buffers["owner"]
        assert a is not None, "it always has an A"
        assert owner is not None, "and owners of its rows"
        low = self.products(x if x.dtype == a.dtype else x.to(a.dtype), a)  # (..., sum of R)
        gates = self.gates.spread(self.gates.coefficients(self.layout, owner, low.dtype), low)
        return low * gates if torch.is_grad_enabled() else low.mul_(gates)

    def _asking(self) -> int:
        """How many members ask under the present gates; the others leave their base's output as it is."""
        return sum(self.gates.is_active(experts) for experts in self.experts)

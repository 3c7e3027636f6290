"""Linear layers with experts on top.

    y = W x + b + sum_e g_e ( rho_e W x + W kappa_e x + B_e A_e x + (S_e - W) x + db_e )

Modules that read the same input share one product with their stacked A; each adds its own B into the base's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.tree import is_transposed


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
    ) -> None:
        super().__init__()
        self.gates = gates
        self.latest = latest
        self.experts = [frozenset(term.expert for term in terms) for terms in members]
        low = [[term for term in terms if term.delta.a is not None] for terms in members]
        stacked = [term.delta.a for terms in low for term in terms if term.delta.a is not None]
        self.register_buffer("a", _laid_out(torch.cat(stacked).to(device, dtype)))  # (sum of R, d_in)
        ranks = [(term.expert, term.delta.rank) for terms in low for term in terms]
        self.layout = tuple(ranks)
        owner = [expert for expert, rank in ranks for _ in range(rank)]
        self.register_buffer("owner", torch.tensor(owner, device=device))
        ends = torch.tensor([sum(term.delta.rank for term in terms) for terms in low]).cumsum(0).tolist()
        self.bounds = list(zip([0, *ends], ends, strict=False))

    def forward(self, x: Tensor, member: int) -> Tensor:
        """The gated low-rank activations of one member.

        Args:
            x: Its input, (..., d_in). Members called with the same tensor share the product.
            member: Which module asks.

        Returns:
            g A x, (..., R of that module).
        """
        latest = self.latest
        if x is not latest.input or self is not latest.site:
            low = F.linear(x.to(self.a.dtype), self.a)  # (..., sum of R)
            coefficients = self.gates.coefficients(self.layout, self.owner, low.dtype)
            low = low * self.gates.spread(coefficients, low)
            if len(self.bounds) == 1:
                return low
            asking = self.gates.derived(self, self._asking)
            latest.site, latest.input, latest.low, latest.waiting = self, x, low, asking
        assert latest.low is not None, "it comes with its input"
        start, stop = self.bounds[member]
        result = latest.low[..., start:stop]
        latest.waiting -= 1
        if latest.waiting == 0:
            latest.site = latest.input = latest.low = None
        return result

    def _asking(self) -> int:
        """How many members ask under the present gates; the others leave their base's output as it is."""
        return sum(self.gates.is_active(experts) for experts in self.experts)


class BlendedLinear(Blended):
    """A linear layer, Conv1D or quantised linear layer with experts on top.

    Args:
        base: The frozen layer; never written to.
        terms: What the experts do to it.
        gates: Of the model.
        shared: Where its A is stacked, where any term has a low-rank delta.
        member: Its number there.
        dtype: Of B.
        device: Of the layer.
    """

    b: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        terms: Sequence[Term],
        gates: Gates,
        shared: SharedInput | None,
        member: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(base, gates, (term.expert for term in terms))
        # In a tuple, so that the module tree does not hold what belongs to several modules.
        self._shared = (shared,)
        self._member = member
        low = [term.delta.b for term in terms if term.delta.b is not None]
        self.register_buffer("b", _laid_out(torch.cat(low, dim=1).to(device, dtype)) if low else None)  # (d_out, R)
        self.row = Vectors.of(terms, "row", device)
        self.column = Vectors.of(terms, "column", device)
        self.shift = Vectors.of(terms, "bias", device)
        self.saved = [
            (term.expert, term.factor, _as_matrix(base, term.delta.saved).to(device, dtype))
            for term in terms
            if term.delta.saved is not None
        ]

    @property
    def shared(self) -> SharedInput | None:
        """Where its A is stacked."""
        return self._shared[0]

    def held(self) -> list[Tensor]:
        vectors = [own.stack for own in (self.row, self.column, self.shift) if own]
        stacked = [] if self.shared is None else [self.shared.a]
        return [*super().held(), *stacked, *vectors, *(matrix for _, _, matrix in self.saved)]

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer.

        Args:
            x: Activations, (..., d_in).

        Returns:
            y, (..., d_out), in the dtype the base gives.
        """
        y: Tensor = self.base(x)  # (..., d_out)
        if not self.is_active:
            return y
        if self.row or self.column or self.saved:
            y = self._reshaped(x, y)
        if self.b is not None:
            assert self.shared is not None, "b comes with a stacked a"
            low = self.shared(x, self._member)  # (..., R)
            if y.dtype == self.b.dtype:
                y.view(-1, y.shape[-1]).addmm_(low.flatten(0, -2), self.b.T)
            else:
                y = y + F.linear(low, self.b).to(y.dtype)
        if self.shift:
            y = y + self.gates.spread(self.shift.sum(self.gates), y).to(y.dtype)
        return y

    def delta(self) -> Tensor:
        """The low-rank part of the blend under the first row of gates, (d_out, d_in), in the dtype of B."""
        assert self.b is not None, "only for modules with low-rank deltas"
        assert self.shared is not None, "b comes with a stacked a"
        start, stop = self.shared.bounds[self._member]
        gates = self.gates.values[0, self.shared.owner[start:stop]].to(self.b.dtype)
        return (self.b * gates) @ self.shared.a[start:stop]

    def _reshaped(self, x: Tensor, y: Tensor) -> Tensor:
        """The terms that act through W itself."""
        bias = getattr(self.base, "bias", None)
        product = y if bias is None else y - bias  # W x
        total = y
        if self.saved:
            keep = 1.0 - torch.stack([self._gate(expert) * factor for expert, factor, _ in self.saved]).sum(0)
            total = product * self.gates.spread(keep, y).to(y.dtype)
            for expert, factor, matrix in self.saved:
                gate = self.gates.spread(self._gate(expert) * factor, y).to(y.dtype)
                total = total + gate * F.linear(x, matrix).to(y.dtype)
            total = total if bias is None else total + bias
        if self.row:
            total = total + product * self.gates.spread(self.row.sum(self.gates), y).to(y.dtype)
        if self.column:
            scaled = x * self.gates.spread(self.column.sum(self.gates), x).to(x.dtype)
            added = self.base(scaled)
            total = total + (added if bias is None else added - bias)
        return total

    def _gate(self, expert: int) -> Tensor:
        return self.gates.values[:, expert, None]  # (rows, 1)


@dataclass(frozen=True)
class Vectors:
    """One vector per expert, of which a gated sum is taken."""

    experts: Tensor
    """(K,), int64."""
    stack: Tensor
    """(K, n), float32."""

    @staticmethod
    def of(terms: Sequence[Term], name: str, device: torch.device) -> Vectors | None:
        """The vectors of that name among the deltas; None where there are none."""
        found = [(term.expert, vector) for term in terms if (vector := getattr(term.delta, name)) is not None]
        if not found:
            return None
        experts = torch.tensor([expert for expert, _ in found], device=device)
        return Vectors(experts, torch.stack([vector for _, vector in found]).to(device))

    def sum(self, gates: Gates) -> Tensor:
        """(rows, n), float32."""
        return gates.combine(id(self), self.experts, self.stack)


def _laid_out(factor: Tensor) -> Tensor:
    """The same values in the order in memory that a product with a single vector reads fastest.

    On CPU in float32 that is column by column, measured: 47 against 100 us for (2048, 128) on two cores; in bfloat16
    it is row by row, 31 against 48 us.
    """
    by_column = factor.device.type == "cpu" and factor.dtype == torch.float32
    return factor.T.contiguous().T if by_column else factor


def _as_matrix(base: nn.Module, stored: Tensor) -> Tensor:
    """A saved matrix as (d_out, d_in), however the base stores its own."""
    return stored.T.contiguous() if is_transposed(base) else stored

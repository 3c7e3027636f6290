"""Linear layers with experts on top.

    y = W x + b + sum_e g_e ( rho_e W x + W kappa_e x + B_e A_e x + (S_e - W) x + db_e )

Modules that read the same input share one product with their stacked A; each adds its own B into the base's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.product import Products
from lmoe_cli.bank.shared import SharedInput
from lmoe_cli.bank.site import FusedSite
from lmoe_cli.bank.sparse import add_shares
from lmoe_cli.bank.stacked import StackedB
from lmoe_cli.bank.tree import is_packed, is_transposed
from lmoe_cli.bank.vectors import Vectors


class BareLinear(Blended):
    """A linear layer without experts, computed by the fastest kernels while some expert acts elsewhere.

    Args:
        base: The frozen layer.
        gates: Of the model.
        count: E.
        products: Kernels to use.
    """

    def __init__(self, base: nn.Module, gates: Gates, count: int, products: Products) -> None:
        super().__init__(base, gates, range(count))
        self.products = products

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer: (..., d_in) → (..., d_out)."""
        base = self._modules["base"]
        assert base is not None, "there is always a base"
        if self.is_active:
            return self.products.of(base, x)
        result: Tensor = base(x)
        return result


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
        products: Kernels to use.
    """

    def __init__(
        self,
        base: nn.Module,
        terms: Sequence[Term],
        gates: Gates,
        shared: SharedInput | None,
        member: int,
        dtype: torch.dtype,
        device: torch.device,
        products: Products,
    ) -> None:
        super().__init__(base, gates, (term.expert for term in terms))
        self.products = products
        # In a tuple, so that the module tree does not hold what belongs to several modules.
        self._shared = (shared,)
        self._site: FusedSite | None = None
        self.member = member
        """Its number in the stacked A."""
        low = [term.delta.b for term in terms if term.delta.b is not None]
        self.b = StackedB(low, dtype, device) if low else None
        self.row = Vectors.of(terms, "row", device)
        self.column = Vectors.of(terms, "column", device)
        self.shift = Vectors.of(terms, "bias", device)
        self.saved = [
            (term.expert, term.factor, _as_matrix(base, term.delta.saved).to(device, dtype))
            for term in terms
            if term.delta.saved is not None
        ]
        self.bends = bool(self.row or self.column or self.saved)
        """Whether some terms act through W itself."""
        scales_only = not self.column and not self.saved and (not self.row or getattr(base, "bias", None) is None)
        self._is_packed = is_packed(base)
        is_known = type(base) is nn.Linear or self._is_packed
        self.is_plain = is_known and device.type == "cpu" and bool(low) and scales_only
        """Whether `_one` knows all that is done here."""
        self.has_plain_siblings = False
        self._kind = dtype
        self._width = getattr(base, "in_features", 0)

    def join(self, site: FusedSite | None, *, are_plain: bool) -> None:
        """Be computed together with its siblings.

        Args:
            site: Kernels for all of them at once, where there are any.
            are_plain: Whether all of them are.
        """
        self._site, self.has_plain_siblings = site, are_plain and site is None

    @property
    def shared(self) -> SharedInput | None:
        """Where its A is stacked."""
        return self._shared[0]

    def held(self) -> list[Tensor]:
        vectors = [own.stack for own in (self.row, self.column, self.shift) if own]
        stacked = [] if self.shared is None or self.b is None else [self.shared.a, self.b.tensor]
        return [*super().held(), *stacked, *vectors, *(matrix for _, _, matrix in self.saved)]

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer.

        Args:
            x: Activations, (..., d_in).

        Returns:
            y, (..., d_out), in the dtype the base gives.
        """
        if self.gates.reads_input:
            self.gates.read(x, self)
        if self.has_plain_siblings and x.numel() == self._width and x.dtype is self._kind:
            quick = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            if quick and (y := self._one(x)) is not None:
                return y
        base = self._modules["base"]
        assert base is not None, "there is always a base"
        if not self.is_active:
            plain: Tensor = base(x)
            return plain
        site, b = self._site, self.b
        if site is None or not site.takes(x):
            y = self._based(base, x)
            y = y if b is None else self._with_low(x, y, b)
        elif (whole := site.whole(x, self.member)) is not None:
            y = whole
        else:
            y = site.behind(x, self._based(base, x), self.member)
        if self.shift:
            y = y + self.shift.sum(self.gates, y)
        return y

    def _one(self, x: Tensor) -> Tensor | None:
        """The same for a single vector, on the shortest way; None where that is not the way to go.

        Args:
            x: (..., d_in), one vector.

        Returns:
            (..., d_out).
        """
        base, shared = self._modules["base"], self._shared[0]
        assert base is not None, "there is always a base"
        assert shared is not None, "it is plain"
        assert self.b is not None, "it is plain"
        if base._forward_hooks or base._forward_pre_hooks or not shared.is_for_one(x, self.member):
            return None
        own = base._parameters
        y: Tensor = base(x) if self._is_packed else self.products.one(x, own["weight"], own["bias"])  # type: ignore[arg-type]
        if self.row:
            y.addcmul_(y, self.row.sum(self.gates, y))
        shared.add_one(y, x, self.member, self.b)
        if self.shift:
            y.add_(self.shift.sum(self.gates, y))
        return y

    def _based(self, base: nn.Module, x: Tensor) -> Tensor:
        """The base's output and the terms that act through W itself."""
        y = self.products.of(base, x)  # (..., d_out)
        return self._reshaped(x, y) if self.bends else y

    def _with_low(self, x: Tensor, y: Tensor, b: StackedB) -> Tensor:
        """The terms of low rank."""
        shared = self._shared[0]
        assert shared is not None, "b comes with a stacked a"
        if shared.is_sparse(x):
            return add_shares(y, x, shared.a, b, shared.members[self.member], self.gates, self.products)
        low = shared.low(x, self.member)  # (..., R)
        return b.add(y.view(-1, y.shape[-1]), low.flatten(0, -2), self.products).view(y.shape)

    def delta(self) -> Tensor:
        """The low-rank part of the blend under the first row of gates, (d_out, d_in), float32."""
        assert self.b is not None, "only for modules with low-rank deltas"
        assert self.shared is not None, "b comes with a stacked a"
        start, stop = self.shared.bounds[self.member]
        gates = self.gates.values[0, self.shared.owner[start:stop]]
        # In 16 bits it would be rounded once more, and take minutes on a processor without instructions for them.
        return (self.b.matrix.float() * gates) @ self.shared.a[start:stop].float()

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
            total = torch.addcmul(total, product, self.row.sum(self.gates, y))
        if self.column:
            scaled = x * self.column.sum(self.gates, x)
            added = self.base(scaled)
            total = total + (added if bias is None else added - bias)
        return total

    def _gate(self, expert: int) -> Tensor:
        return self.gates.values[..., expert, None]  # (rows, 1)


def _as_matrix(base: nn.Module, stored: Tensor) -> Tensor:
    """A saved matrix as (d_out, d_in), however the base stores its own."""
    return stored.T.contiguous() if is_transposed(base) else stored

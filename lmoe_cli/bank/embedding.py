"""Input embeddings with experts on top.

    y = W[t] + sum_e g_e ( rho_e W[t] + B_e A_e[:, t] + (S_e - W)[t] )

A row lookup in the transposed A, then B. Factors that the model puts on its embedding also act on what is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.vectors import Vectors


class BlendedEmbedding(Blended):
    """An embedding with experts on top.

    Args:
        base: The frozen embedding; never written to.
        terms: What the experts do to it.
        gates: Of the model.
        dtype: Of the factors.
        device: Of the embedding.
    """

    a: Tensor | None
    b: Tensor | None
    owner: Tensor

    def __init__(
        self, base: nn.Module, terms: Sequence[Term], gates: Gates, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(base, gates, (term.expert for term in terms))
        low = [term for term in terms if term.delta.a is not None]
        a = [term.delta.a.T for term in low if term.delta.a is not None]
        b = [term.delta.b for term in low if term.delta.b is not None]
        self.register_buffer("a", torch.cat(a, dim=1).to(device, dtype).contiguous() if a else None)  # (V, R)
        self.register_buffer("b", torch.cat(b, dim=1).to(device, dtype) if b else None)  # (D, R)
        self.layout = tuple((term.expert, term.delta.rank) for term in low)
        owner = [term.expert for term in low for _ in range(term.delta.rank)]
        self.register_buffer("owner", torch.tensor(owner, device=device, dtype=torch.long))
        gates.coefficients(self.layout, self.owner, dtype)  # from now on, so that compiled code finds them
        self.row = Vectors.of(terms, "row", device)
        self.saved = [
            (term.expert, term.factor, term.delta.saved.to(device, dtype))
            for term in terms
            if term.delta.saved is not None
        ]

    def held(self) -> list[Tensor]:
        vectors = [self.row.stack] if self.row else []
        return [*super().held(), *vectors, *(matrix for _, _, matrix in self.saved)]

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens up.

        Args:
            tokens: (B, T), int64; positions that all rows of the batch share come as (1, T) or (T,).

        Returns:
            (B, T, D), in the dtype of the base; where rows carry different gates, B is their number.
        """
        rows = self.gates.rows if self.is_active else 1
        if rows > 1 and (tokens.dim() == 1 or tokens.shape[0] == 1):
            tokens = tokens.expand(rows, tokens.shape[-1])
        y: Tensor = self.base(tokens)  # (B, T, D)
        if not self.is_active:
            return y
        scale = getattr(self.base, "embed_scale", None)
        base = y
        if self.saved:
            shares = [self.gates.values[..., expert, None] * factor for expert, factor, _ in self.saved]
            keep = 1.0 - torch.stack(shares).sum(0)
            y = y * self.gates.spread(keep, y).to(y.dtype)
            for expert, factor, matrix in self.saved:
                gate = self.gates.spread(self.gates.values[..., expert, None] * factor, y).to(y.dtype)
                y = y + gate * _scaled(F.embedding(tokens, matrix), scale).to(y.dtype)
        if self.row:
            y = torch.addcmul(y, base, self.row.sum(self.gates, y))
        if self.a is not None and self.b is not None:
            low = F.embedding(tokens, self.a)  # (B, T, R)
            coefficients = self.gates.coefficients(self.layout, self.owner, low.dtype)
            low = low * self.gates.spread(coefficients, low)
            y = y + _scaled(F.linear(low, self.b), scale).to(y.dtype)
        return y


def _scaled(values: Tensor, scale: Tensor | float | None) -> Tensor:
    return values if scale is None else values * torch.as_tensor(scale, dtype=values.dtype, device=values.device)

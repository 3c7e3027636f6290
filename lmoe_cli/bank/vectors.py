"""Vectors that experts bring to a module: row and column scales, biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates


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

    def sum(self, gates: Gates, x: Tensor) -> Tensor:
        """The gated sum, in the dtype of what it will be multiplied with or added to, and broadcasting against it.

        Args:
            gates: Of the model.
            x: (batch, ..., n), or flattened to (batch x tokens, n).
        """
        if gates.are_same and not gates.values.requires_grad:
            return gates.derived((id(self), x.dtype), lambda: self._combined(gates)[0].to(x.dtype))
        return gates.spread(self._combined(gates), x).to(x.dtype)

    def _combined(self, gates: Gates) -> Tensor:
        return gates.combine(id(self), self.experts, self.stack)

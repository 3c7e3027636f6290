"""The fused experts of a mixture-of-experts base, each of which adapters may change on its own.

    h = act(W_gate x) * (W_up x),   y = sum_k p_k W_down h

with every W of every chosen expert blended as in `linear`. The tokens of one expert are taken together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.gates import Gates


@dataclass(frozen=True)
class SliceTerm:
    """One expert adapter's part in one slice of a fused tensor."""

    parameter: str
    """``gate_up_proj``, ``up_proj`` or ``down_proj``."""
    index: int
    """Which expert of the mixture."""
    rows: tuple[int, int] | None
    """Which outputs; all where None."""
    term: Term


class BlendedExperts(Blended):
    """A module of fused experts with adapters on top.

    Args:
        base: The frozen module, with ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` of three dimensions.
        terms: What the adapters do to slices of them.
        gates: Of the model.
        dtype: Of the factors.
        device: Of the module.
    """

    def __init__(
        self, base: nn.Module, terms: Sequence[SliceTerm], gates: Gates, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(base, gates, (item.term.expert for item in terms))
        self._parts: dict[tuple[str, int], list[_Part]] = {}
        for number, item in enumerate(terms):
            delta = item.term.delta
            assert delta.bias is None, "fused experts have no biases that adapters may change"
            assert delta.saved is None, "fused experts are not saved one by one"
            held: dict[str, Tensor] = {}
            for name in ("a", "b", "row", "column"):
                if (tensor := getattr(delta, name)) is not None:
                    self.register_buffer(f"{name}{number}", tensor.to(device, dtype))
                    held[name] = getattr(self, f"{name}{number}")
            part = _Part(item.term.expert, item.rows, **held)
            self._parts.setdefault((item.parameter, item.index), []).append(part)

    def factors(self, expert: int) -> list[tuple[Tensor, Tensor]]:
        """A (r, D) and B (d_out, r) of an adapter on each matrix that reads the tokens themselves."""
        return [
            (part.a, part.b)
            for (parameter, _), own in self._parts.items()
            for part in own
            if part.expert == expert and parameter != "down_proj" and part.a is not None and part.b is not None
        ]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the chosen experts.

        Args:
            hidden_states: Tokens, (N, D).
            top_k_index: Experts chosen for each, (N, K), int64.
            top_k_weights: Their weights, (N, K).

        Returns:
            (N, D).
        """
        if self.gates.reads_input:
            self.gates.read(hidden_states, self)
        if not self.is_active:
            result: Tensor = self.base(hidden_states, top_k_index, top_k_weights)
            return result
        base: Any = self.base
        gates = self.gates.spread(self.gates.values, hidden_states)  # (N, E), or (E,) for all of them
        total = torch.zeros_like(hidden_states)
        up = "gate_up_proj" if getattr(base, "has_gate", True) else "up_proj"
        for index in torch.unique(top_k_index).tolist():
            if index >= base.num_experts:  # the mark of a token sent elsewhere
                continue
            tokens, slot = (top_k_index == index).nonzero(as_tuple=True)
            own = gates[tokens] if gates.dim() == 2 else gates
            x = hidden_states[tokens]  # (n, D)
            h = self._linear(up, index, x, own)
            h = base._apply_gate(h) if up == "gate_up_proj" else base.act_fn(h)
            y = self._linear("down_proj", index, h, own)
            if getattr(base, "has_post_expert_norm", False):
                y = base.post_expert_norm(y)
            total.index_add_(0, tokens, (y * top_k_weights[tokens, slot, None]).to(total.dtype))
        return total

    def _linear(self, parameter: str, index: int, x: Tensor, gates: Tensor) -> Tensor:
        base: Any = self.base
        weight: Tensor = getattr(base, parameter)[index]
        weight = weight if getattr(base, "is_transposed", False) else weight.T  # (d_in, d_out)
        product = x @ weight  # (n, d_out)
        y = product + getattr(base, f"{parameter}_bias")[index] if getattr(base, "has_bias", False) else product.clone()
        for part in self._parts.get((parameter, index), []):
            gate = gates[..., part.expert, None].to(x.dtype)
            own = slice(*part.rows) if part.rows else slice(None)
            if part.a is not None and part.b is not None:
                y[:, own] += (x @ part.a.T * gate) @ part.b.T
            if part.row is not None:
                y[:, own] += product[:, own] * (part.row * gate)
            if part.column is not None:
                y[:, own] += (x * (part.column * gate)) @ weight[:, own]
        return y


@dataclass(frozen=True)
class _Part:
    """What one adapter does to one matrix. See `Delta`."""

    expert: int
    rows: tuple[int, int] | None
    a: Tensor | None = None
    """(R, d_in)."""
    b: Tensor | None = None
    """(d_out, R)."""
    row: Tensor | None = None
    """(d_out,)."""
    column: Tensor | None = None
    """(d_in,)."""

"""Small modules that are not linear layers: norms with saved weights or biases, routers of a mixture.

They run with blended parameters, made once per change of gates; rows of a batch with different gates run one after the
other, and so do tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.delta import Delta, Term, bias_update, update
from lmoe_cli.bank.gates import Gates


class BlendedModule(Blended):
    """Any module whose first input and whose outputs have the batch, or batch and tokens, in front.

    Args:
        base: The frozen module; never written to.
        terms: What the experts do to its ``weight`` and ``bias``.
        gates: Of the model.
    """

    def __init__(self, base: nn.Module, terms: Sequence[Term], gates: Gates) -> None:
        super().__init__(base, gates, (term.expert for term in terms))
        self.terms = list(terms)
        self._order = torch.tensor(sorted(self.experts), device=gates.values.device)
        self._changes: dict[str, Tensor] = {}
        """Parameter → what each expert of `_order` adds to it, (experts here, ...), float32; see `unroll`."""

    def held(self) -> list[Tensor]:
        parts = ("a", "b", "row", "column", "bias", "saved")
        return [tensor for term in self.terms for name in parts if (tensor := getattr(term.delta, name)) is not None]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module under each distinct row of gates.

        Args:
            x: (batch, ...), or flattened to (batch x tokens, ...).
            *args: Passed on as they are.
            **kwargs: Passed on as they are.

        Returns:
            What the base gives, row by row.
        """
        if not self.is_active:
            return self.base(x, *args, **kwargs)
        if self.gates.are_of_tokens:
            return self._by_tokens(x, *args, **kwargs)
        if self.gates.rows == 1:
            return functional_call(self.base, dict(self._parameters_at(0)), (x, *args), kwargs)
        grouped = x.view(self.gates.rows, self.gates.share(x), *x.shape[1:])  # (rows, batch / rows, ...)
        outputs = [
            functional_call(self.base, dict(self._parameters_at(row)), (grouped[row], *args), kwargs)
            for row in range(self.gates.rows)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return type(outputs[0])(torch.cat(parts) for parts in zip(*outputs, strict=True))

    def _by_tokens(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module for all tokens of equal gates together: as many times as there are different ones."""
        gates = self.gates.values.flatten(0, 1)  # (N, E)
        flat = x if len(x) == len(gates) else x.flatten(0, 1)  # (N, ...)
        if len(flat) != len(gates):
            raise ValueError(f"a batch of shape {tuple(x.shape)} cannot carry gates for {len(gates)} tokens")
        distinct, which = torch.unique(gates, dim=0, return_inverse=True)
        outputs = []
        for number, own in enumerate(distinct.tolist()):
            parameters = {name: self._blended(name, own) for name in self._names()}
            outputs.append(functional_call(self.base, parameters, (flat[which == number], *args), kwargs))

        def joined(parts: Sequence[Tensor]) -> Tensor:
            total = parts[0].new_empty(len(flat), *parts[0].shape[1:])
            for number, part in enumerate(parts):
                total[which == number] = part
            return total.view(x.shape) if total.shape == flat.shape else total

        if isinstance(outputs[0], Tensor):
            return joined(outputs)
        return type(outputs[0])(joined(parts) for parts in zip(*outputs, strict=True))

    def _names(self) -> list[str]:
        return [name for name, _ in self.base.named_parameters(recurse=False) if name in ("weight", "bias")]

    def unroll(self) -> None:
        """Make ready for gates that are no numbers, but traced or with a gradient: what each expert changes, whole."""
        if self._changes:
            return
        ones = torch.eye(self.gates.count)[self._order.tolist()].tolist()
        for name in self._names():
            parameter = getattr(self.base, name).detach()
            changed = [self._blended(name, own, torch.float32) for own in ones]
            self._changes[name] = torch.stack(changed).to(parameter.device) - parameter.float()

    def _summed(self, name: str, row: int) -> Tensor:
        parameter: Tensor = getattr(self.base, name)
        gates = self.gates.values[row, self._order]
        blended: Tensor = parameter.float() + torch.tensordot(gates, self._changes[name], dims=1)
        return blended.to(parameter.dtype)

    def _parameters_at(self, row: int) -> Mapping[str, Tensor]:
        is_compiling = torch.compiler.is_compiling()
        if is_compiling or self.gates.values.requires_grad:
            if not is_compiling:
                self.unroll()
            return {name: self._summed(name, row) for name in self._names()}

        def blended(name: str) -> Tensor:
            return self._blended(name, self.gates.values[row].tolist())

        return {name: self.gates.derived((id(self), row, name), partial(blended, name)) for name in self._names()}

    def _gated(self, gates: Sequence[float]) -> Iterator[tuple[float, Delta]]:
        """Gates and deltas; the recipe's factor is folded into all of a delta but a saved matrix."""
        for term in self.terms:
            gate = gates[term.expert]
            yield gate, replace(term.delta, saved=None)
            if term.delta.saved is not None:
                yield gate * term.factor, Delta(saved=term.delta.saved)

    def _blended(self, name: str, gates: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        parameter: Tensor = getattr(self.base, name)
        parameter = parameter if dtype is None else parameter.detach().to(dtype)
        terms = list(self._gated(gates))
        if name == "bias":
            change = bias_update(terms)
            return parameter if change is None else (parameter + change.to(parameter.device)).to(parameter.dtype)
        blended = torch.empty_like(parameter)
        matrix = parameter if parameter.dim() == 2 else parameter[:, None]
        if (total := update(terms, transposed=False)) is None:
            return parameter
        total.apply_(matrix.detach().cpu(), blended.view_as(matrix))
        return blended

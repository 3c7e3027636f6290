"""Small modules that are not linear layers: norms with saved weights or biases, routers of a mixture.

They run with blended parameters, made once per change of gates; rows of a batch with different gates run one after the
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.delta import Term, bias_update, update
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

    def _parameters_at(self, row: int) -> Mapping[str, Tensor]:
        return {
            name: self.gates.derived((id(self), row, name), lambda name=name: self._blended(name, row))  # type: ignore[misc]
            for name, _ in self.base.named_parameters(recurse=False)
            if name in ("weight", "bias")
        }

    def _blended(self, name: str, row: int) -> Tensor:
        parameter: Tensor = getattr(self.base, name)
        gates = self.gates.values[row].tolist()
        terms = [(gates[term.expert] * term.factor, term.delta) for term in self.terms]
        if name == "bias":
            change = bias_update(terms)
            return parameter if change is None else (parameter + change.to(parameter.device)).to(parameter.dtype)
        blended = torch.empty_like(parameter)
        matrix = parameter if parameter.dim() == 2 else parameter[:, None]
        if (total := update(terms, transposed=False)) is None:
            return parameter
        total.apply_(matrix.detach().cpu(), blended.view_as(matrix))
        return blended

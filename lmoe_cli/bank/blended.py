"""What all blended modules share: a frozen base, and looking like it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lmoe_cli.bank.gates import Gates


class Blended(nn.Module):
    """A module of the base with experts on top.

    Attributes that it does not have itself are those of its base, because model classes look at them.

    Args:
        base: The frozen module; never written to.
        gates: Of the model.
        experts: Numbers of the experts that change it.
    """

    def __init__(self, base: nn.Module, gates: Gates, experts: Iterable[int]) -> None:
        super().__init__()
        self.base = base
        self.gates = gates
        self.experts = frozenset(experts)

    @property
    def is_active(self) -> bool:
        """Whether any expert acts here at present."""
        return self.gates.is_active(self.experts)

    def held(self) -> list[Tensor]:
        """What experts bring here: factors, vectors and whole matrices."""
        return list(self.buffers(recurse=False))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

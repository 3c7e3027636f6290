"""The rank at which one LoRA has as many numbers as all experts of a loadout together."""

from __future__ import annotations

from typing import NamedTuple

from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.loadout import Loadout


class Size(NamedTuple):
    """One LoRA in the place of several."""

    rank: int
    targets: list[str]
    """Last parts of the names of the modules that any of the experts changes."""
    numbers: int
    """That the experts have together."""


def same_size(loadout: Loadout) -> Size:
    """How large one LoRA has to be.

    Args:
        loadout: Its experts change linear layers.

    Returns:
        The rank to the nearest whole number, on every module that any of the experts changes.

    Raises:
        UsageError: No expert changes a linear layer by a low-rank product.
    """
    changed: dict[str, int] = {}
    numbers = 0
    for expert in loadout.experts:
        numbers += sum(tensor.info.elements for tensor in expert.adapter.stored.values())
        for part in expert.adapter.parts.values():
            if part.kind == "lora" and part.shape and part.experts == 1:
                changed[part.module] = sum(part.shape)
    if not changed:
        hint = "leave --retrain out"
        raise UsageError("usage", f"{loadout.origin}: no expert is a LoRA on linear layers", hint=hint)
    leaves = sorted({name.rpartition(".")[2] for name in changed})
    return Size(max(1, round(numbers / sum(changed.values()))), leaves, numbers)

"""The rank at which one LoRA has as many numbers as all experts of a loadout together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lmoe_cli.bank.tree import Tree, linear_layers
from lmoe_cli.engine.base_model import empty_model
from lmoe_cli.errors import UsageError
from lmoe_cli.findings import Finding, finding
from lmoe_cli.loadout.loadout import Expert, Loadout

MAX_RANK = 4096
"""Of what `lmoe train` trains."""
TOLERANCE = 0.05
"""Share of the numbers by which two sizes may differ and still be told as the same."""


class Size(NamedTuple):
    """One LoRA in the place of several."""

    rank: int
    targets: list[str]
    """Names of the modules that any of the experts changes, as far as a LoRA is trained on them."""
    numbers: int
    """That the experts have together."""


def same_size(loadout: Loadout, *, trust_remote_code: bool = False) -> Size:
    """How large one LoRA has to be.

    Args:
        loadout: Its experts change linear layers.
        trust_remote_code: Let the base run code of its repository.

    Returns:
        The rank to the nearest whole number, at most `MAX_RANK`, on every linear layer that any of the experts changes.

    Raises:
        UsageError: No expert changes a linear layer by a low-rank product.
    """
    model = empty_model(loadout.base, trust_remote_code=trust_remote_code)
    tree, layers = Tree(model), dict(linear_layers(model))
    targets: dict[str, int] = {}
    for expert in loadout.experts:
        for item in loadout.assignments[expert.name][0]:
            if item.part.kind != "lora":
                continue
            place = tree.find(item)
            if place.parameter is None and place.module in layers:
                targets[place.module] = _width(layers[place.module])
    if not targets:
        hint = "leave --retrain out"
        raise UsageError("usage", f"{loadout.origin}: no expert is a LoRA on linear layers", hint=hint)
    numbers = numbers_of(loadout.experts)
    rank = max(1, round(numbers / sum(targets.values())))
    return Size(min(rank, MAX_RANK), sorted(targets), numbers)


def numbers_of(experts: Sequence[Expert]) -> int:
    """How many numbers are stored of some experts."""
    return sum(tensor.info.elements for expert in experts for tensor in expert.adapter.stored.values())


def about_size(size: Size, numbers: int) -> list[Finding]:
    """What has to be known where one LoRA did not come out as large as the experts.

    Args:
        size: That it should have.
        numbers: That it has.
    """
    if abs(numbers - size.numbers) <= TOLERANCE * size.numbers:
        return []
    message = f"one LoRA of rank {size.rank} has {numbers} numbers, and the experts have {size.numbers} together"
    return [finding("retrained-size", "retrained", message, "judge what it gains or loses by its size, too")]


def _width(layer: nn.Module) -> int:
    """d_in + d_out of a linear layer: how many numbers a LoRA has there per rank."""
    weight = layer.weight
    assert isinstance(weight, Tensor), "it is linear"
    return sum(weight.shape)

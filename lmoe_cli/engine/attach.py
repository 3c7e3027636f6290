"""Put a bank onto a loaded base, and take it off again. The base's own modules and weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.blocks import block_names
from lmoe_cli.bank.routed import MODEL, Place, RoutedGates


def attach(model: nn.Module, modules: Mapping[str, Blended]) -> None:
    """Replace modules of a model by blended ones that hold them.

    Args:
        model: The base.
        modules: Name → replacement; none inside another.
    """
    put(model, modules)


def listen(model: nn.Module, places: Mapping[str, Place]) -> list[RemovableHandle]:
    """Let gates of whole blocks, or of the model, read what flows into them.

    Args:
        model: The base.
        places: Of the bank.

    Returns:
        To be removed when the experts are taken off.
    """
    handles = []
    for place in places.values():
        if not place.gates.reads_input:
            block = place.name if place.name != MODEL else block_names(model)[0]
            hook = partial(_hand_over, place.gates)
            handles.append(model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _hand_over(gates: RoutedGates, module: nn.Module, inputs: tuple[Any, ...], words: dict[str, Any]) -> None:
    del module
    gates.read(inputs[0] if inputs else words["hidden_states"])


def detach(model: nn.Module, modules: Mapping[str, Blended]) -> None:
    """Put the base's own modules back."""
    put(model, {name: module.base for name, module in modules.items()})


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace modules of a model by name."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)

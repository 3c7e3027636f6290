"""Put a bank onto a loaded base, and take it off again. The base's own modules and weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lmoe_cli.bank.blended import Blended


def attach(model: nn.Module, modules: Mapping[str, Blended]) -> None:
    """Replace modules of a model by blended ones that hold them.

    Args:
        model: The base.
        modules: Name → replacement; none inside another.
    """
    put(model, modules)


def detach(model: nn.Module, modules: Mapping[str, Blended]) -> None:
    """Put the base's own modules back."""
    put(model, {name: module.base for name, module in modules.items()})


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace modules of a model by name."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)

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
    for name, module in modules.items():
        _put(model, name, module)


def detach(model: nn.Module, modules: Mapping[str, Blended]) -> None:
    """Put the base's own modules back."""
    for name, module in modules.items():
        _put(model, name, module.base)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

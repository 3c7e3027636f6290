"""The blocks of a transformer: its layers, one after the other."""

from __future__ import annotations

from typing import Any

from torch import nn


def block_names(model: nn.Module) -> list[str]:
    """Names of a model's blocks among ``model.named_modules()``, in order; none where there is no such list."""
    count = getattr(text_config(model), "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0:
            return [f"{name}.{number}" if name else str(number) for number in range(count)]
    return []


def block_width(model: nn.Module) -> int:
    """Numbers per token that flow from block to block; 0 where the model's config does not say."""
    return int(getattr(text_config(model), "hidden_size", 0) or 0)


def text_config(model: nn.Module) -> Any:
    """The config of the part that reads and writes text, where a model has others too."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config

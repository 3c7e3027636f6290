"""Compose LoRA adapters: check, blend, chat and bake one model out of many.

>>> import lmoe_cli
>>> engine = lmoe_cli.load("recipes/battlemage.yaml")
>>> engine.generate("A goblin blocks the bridge.")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmoe_cli.engine.build import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load`, and with it torch, only when it is asked for."""
    if name == "load":
        from lmoe_cli.engine.build import load

        return load
    raise AttributeError(f"module 'lmoe_cli' has no attribute {name!r}")

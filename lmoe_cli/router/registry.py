"""The class behind a router's settings. Naming it loads none."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lmoe_cli.loadout.routers import RouterSettings

if TYPE_CHECKING:
    from lmoe_cli.router.static import StaticRouter


def load(settings: RouterSettings) -> type[StaticRouter]:
    """Import a router's class.

    Args:
        settings: From a recipe.
    """
    module, _, name = settings.implementation.partition(":")
    cls: type[StaticRouter] = getattr(importlib.import_module(module), name)
    return cls

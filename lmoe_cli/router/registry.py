"""The class behind the type of a router that a recipe names. Naming it loads none.

The types are those of the union `Router` in `loadout.recipe`: type ``static`` is the class ``StaticRouter`` of
``router/static.py``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmoe_cli.router.static import StaticRouter


def load(type_: str) -> type[StaticRouter]:
    """Import a router's class.

    Args:
        type_: One of `loadout.recipe.ROUTER_TYPES`, as the recipe's own check has made sure.
    """
    module = importlib.import_module(f"lmoe_cli.router.{type_}")
    cls: type[StaticRouter] = getattr(module, f"{type_.title()}Router")
    return cls

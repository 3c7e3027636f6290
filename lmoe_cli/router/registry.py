"""The class behind a router's settings. Naming it loads none."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.routers import BUILT_IN, RouterSettings

if TYPE_CHECKING:
    from lmoe_cli.router.static import StaticRouter

PARENTS = {
    "fixed": "lmoe_cli.router.static:StaticRouter",
    "prompt": "lmoe_cli.router.prompt:PromptRouter",
    "token": "lmoe_cli.router.token:TokenRouter",
}
"""Scope → what a router of it must be, because an engine treats it so."""


def load(settings: RouterSettings) -> type[StaticRouter]:
    """Import a router's class.

    Args:
        settings: From a recipe.

    Raises:
        UsageError: A plug-in's class cannot be imported, or does not decide at the scope that its settings name.
    """
    if settings.type in BUILT_IN:
        own: type[StaticRouter] = _imported(settings.implementation)
        return own
    try:
        found = _imported(settings.implementation)
    except Exception as error:  # code of somebody else, which fails with whatever it raises
        raise _broken(settings, f"cannot be imported: {type(error).__name__}: {str(error)[:200]}") from error
    due: type[StaticRouter] = _imported(PARENTS[settings.scope])
    if not (isinstance(found, type) and issubclass(found, due)):
        raise _broken(settings, f"is for routers of scope '{settings.scope}' and no {due.__name__}")
    return found


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _broken(settings: RouterSettings, reason: str) -> UsageError:
    message = f"the router '{settings.type}' is broken: {settings.implementation} {reason}"
    return UsageError("router-broken", message, hint="update the package that brings it, or use another router")

"""Which routers there are. Naming them loads none."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lmoe_cli.router.static import StaticRouter

Scope = Literal["fixed", "prompt", "token"]


@dataclass(frozen=True)
class RouterInfo:
    """A router, without importing it."""

    type: str
    """As recipes name it."""
    scope: Scope
    """What its gates depend on."""
    target: str
    """``package.module:class``."""
    summary: str


ROUTERS = (
    RouterInfo("static", "fixed", "lmoe_cli.router.static:StaticRouter", "the recipe's weights, for good"),
    RouterInfo("weighted", "fixed", "lmoe_cli.router.weighted:WeightedRouter", "the recipe's weights, turned live"),
)


def find(type_: str) -> RouterInfo:
    """The router that a recipe names; the recipe's own check has made sure that there is one."""
    return next(info for info in ROUTERS if info.type == type_)


def load(type_: str) -> type[StaticRouter]:
    """Import a router's class."""
    module, _, attribute = find(type_).target.partition(":")
    cls: type[StaticRouter] = getattr(importlib.import_module(module), attribute)
    return cls

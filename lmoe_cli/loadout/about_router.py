"""Does a recipe's router fit its experts?"""

from __future__ import annotations

from collections.abc import Iterator

from lmoe_cli.adapter.adapter import Adapter
from lmoe_cli.errors import UsageError
from lmoe_cli.findings import Finding, finding
from lmoe_cli.loadout.examples import about_examples
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.routers import BUILT_IN
from lmoe_cli.loadout.trained import about_gate

WHOLE = ("embedding", "saved")
"""Kinds of parts that no router decides on, because they have no input of their own to decide by."""
MIXTURE_ROUTERS = ("gate", "router")


def about_router(loadout: Loadout) -> Iterator[Finding]:
    """What keeps a router from working as its author thinks, from headers and what is on this machine."""
    if loadout.gate:
        yield from about_gate(loadout, loadout.gate)
    yield from about_examples(loadout)
    yield from loadout.recipe.router.about(loadout)
    if loadout.recipe.router.scope != "token":
        return
    for expert in loadout.experts:
        whole = sorted(
            part.module
            for part in expert.adapter.parts.values()
            if part.kind in WHOLE or _is_of_mixture_router(part.module, expert.adapter)
        )
        if whole:
            names = ", ".join(whole[:3]) + (" …" if len(whole) > 3 else "")
            message = f"{expert.name}: the router decides nothing at {names}, where its weight acts in every token"
            yield finding("routed-in-part", expert.name, message)


def _is_of_mixture_router(module: str, adapter: Adapter) -> bool:
    """Whether it is what sends tokens to the experts of a mixture, which is no linear layer."""
    named = adapter.config.target_parameters if adapter.config else []
    is_parameter = any(f".{module}.weight".endswith(f".{name}") for name in named)
    return is_parameter and module.rpartition(".")[2] in MIXTURE_ROUTERS


def require_fixed(loadout: Loadout) -> None:
    """Refuse to write into weights what no weights can hold.

    Raises:
        UsageError: A router decides per prompt or token.
    """
    router = loadout.recipe.router
    if router.type in BUILT_IN and router.scope == "fixed":
        return
    if router.scope == "fixed":
        message = f"{loadout.origin}: what '{router.type}', of another package, makes of the weights shows when it runs"
        hint = "bake a recipe of type 'static' with the weights that come out"
        raise UsageError("router-dynamic", message, hint=hint, where=loadout.origin)
    message = f"{loadout.origin}: the router '{router.type}' decides per {router.scope}, which no weights can hold"
    hint = "lmoe bake --mean-gates --data FILE bakes the mean of its gates, and tells how far that is from it"
    if router.scope == "prompt":
        hint = f"lmoe bake --prompt TEXT bakes the blend of one prompt; {hint}"
    raise UsageError("router-dynamic", message, hint=hint, where=loadout.origin)

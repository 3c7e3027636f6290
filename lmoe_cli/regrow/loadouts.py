"""A loadout with one expert more or less than its trained gate. Light: what is wrong is told before torch is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmoe_cli.check import require
from lmoe_cli.disk import refuse_input
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.loadout import Loadout, resolve
from lmoe_cli.loadout.recipe import Recipe


def require_gate(loadout: Loadout, *, trust_remote_code: bool = False) -> None:
    """Refuse a loadout whose gates were not trained, or whose experts are not those of its gate.

    Raises:
        UsageError: Its router is no trained gate.
        RefusedError: The parts do not fit.
    """
    if loadout.gate is None:
        message = f"{loadout.origin}: the router '{loadout.recipe.router.type}' was not trained"
        hint = "only trained gates grow and shrink: with another router edit the recipe's experts"
        raise UsageError("gate-needed", message, hint=hint, where=loadout.origin)
    require(loadout, trust_remote_code=trust_remote_code)


def require_elsewhere(loadout: Loadout, out: Path) -> None:
    """Refuse to write over what the loadout is made of, its recipe included.

    Raises:
        UsageError: ``out`` is a folder of it, or around one.
    """
    refuse_input(out, {**loadout.places, loadout.origin: Path(loadout.origin)})


def with_expert(loadout: Loadout, name: str, entry: dict[str, Any], *, token: str | None = None) -> Loadout:
    """A loadout with one expert more, the last, and fixed weights.

    Args:
        loadout: Its gate knows the others.
        name: Of the new expert.
        entry: As a recipe would write it.
        token: For the Hub.

    Raises:
        UsageError: The name is taken, or a recipe cannot hold the entry.
        RefusedError: The adapter cannot be read.
    """
    if name in loadout.recipe.experts:
        message = f"{loadout.origin}: there is an expert '{name}' already"
        raise UsageError("expert-taken", message, hint="give the new one another name", where=name)
    experts = {**loadout.recipe.model_dump()["experts"], name: entry}
    return _resolved(loadout, experts, token)


def without_expert(loadout: Loadout, name: str) -> Loadout:
    """A loadout without one of its experts, and fixed weights.

    Raises:
        NotFoundError: There is no such expert.
        UsageError: It is the last one, or the recipe needs it.
    """
    loadout.expert(name)
    experts = loadout.recipe.model_dump()["experts"]
    del experts[name]
    if not experts:
        message = f"{loadout.origin}: '{name}' is its last expert, and a gate without experts decides nothing"
        raise UsageError("expert-last", message, hint="the base alone needs no router", where=name)
    return _resolved(loadout, experts, None)


def _resolved(loadout: Loadout, experts: dict[str, Any], token: str | None) -> Loadout:
    words = {**loadout.recipe.model_dump(exclude={"router"}), "experts": experts}
    try:
        recipe = Recipe.model_validate(words)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("<", "[")))
        said = first["msg"].removeprefix("Value error, ")
        message = f"{loadout.origin}: {where + ': ' if where else ''}{said[0].lower()}{said[1:]}"
        raise UsageError("usage", message, hint="change it in the recipe", where=loadout.origin) from error
    return resolve(recipe, loadout.origin, beside=loadout.folder, token=token)

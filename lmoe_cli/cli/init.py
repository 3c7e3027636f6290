"""`lmoe init`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output, show_findings
from lmoe_cli.disk import expanded, reading
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.adapter.adapter import Adapter
    from lmoe_cli.loadout.recipe import ExpertEntry


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--from", "adapters", multiple=True, required=True, type=params.TEXT, metavar="REF", help="An adapter; repeatable."
)
@click.option("--base", type=params.TEXT, metavar="REF", help="The base; the one that the adapters name when left out.")
@params.force
@params.token
@params.output
def init(file: Path, adapters: tuple[str, ...], base: str | None, force: bool, token: str | None, out: Output) -> None:
    """Write a recipe for some adapters.

    Only their configs and headers are read. Each becomes an expert of equal weight, named after its folder or
    repository.
    """
    from pydantic import ValidationError

    from lmoe_cli.adapter.soundness import inspect_adapter
    from lmoe_cli.files import write_file
    from lmoe_cli.loadout.recipe import ExpertEntry, Recipe
    from lmoe_cli.loadout.write import recipe_text
    from lmoe_cli.source import open_source

    found = [inspect_adapter(open_source(ref, token=token)) for ref in adapters]
    experts: dict[str, ExpertEntry] = {}
    for adapter in found:
        entry = ExpertEntry(adapter=_kept(adapter.ref, file), weight=round(1 / len(found), 2))
        experts[params.expert_name(adapter.ref, experts)] = entry
    chosen = base or _base(found)
    try:
        recipe = Recipe(name=file.stem, base=_kept(chosen, file), experts=experts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"{file}: {first['loc'][0]}: {first['msg'][0].lower()}{first['msg'][1:]}"
        hint = "call the file something else" if first["loc"][0] == "name" else "a recipe cannot hold that"
        raise UsageError("usage", message, hint=hint, where=str(file)) from error
    write_file(file, recipe_text(recipe).encode(), force=force)
    findings = [item for adapter in found for item in adapter.findings]
    if not out.as_json:
        show_findings(findings)
    out.say(f"{file}: {len(experts)} experts on {chosen}; next: lmoe check {quote(str(file))}")
    out.finish({"file": str(file), "recipe": recipe.model_dump(mode="json", exclude_defaults=True)}, findings)


def _base(adapters: list[Adapter]) -> str:
    """The base that all adapters name.

    Raises:
        UsageError: They name none, or different ones.
    """
    from lmoe_cli.loadout.identity import canonical, same

    claims = [adapter.config.base for adapter in adapters if adapter.config and adapter.config.base]
    if not claims:
        raise UsageError("base-needed", "the adapters do not name their base", hint="--base REF")
    other = next((claim for claim in claims if not same(canonical(claim), canonical(claims[0]))), None)
    if other:
        message = f"the adapters name different bases: {claims[0]} and {other}"
        raise UsageError("base-needed", message, hint="--base REF, and accept_base in the recipe")
    return _as_reference(claims[0])


def _as_reference(claim: str) -> str:
    """What an adapter claims as its base, so that it means the Hub where it can, whatever folders are here."""
    from lmoe_cli import hub

    is_unclear = hub.NAME.fullmatch(claim) and ("/" not in claim or Path(claim).exists())
    return f"hf://{claim}" if is_unclear else claim


def _kept(ref: str, file: Path) -> str:
    """A reference as it must stand in the recipe: folders relative to it where they lie below it."""
    if ref.startswith(("demo:", "hf://")):
        return ref
    path = expanded(ref)
    with reading(path):
        if not path.is_dir():
            return ref
    here = file.parent.resolve()
    real = path.resolve()
    return f"./{real.relative_to(here).as_posix()}" if real.is_relative_to(here) else str(real)

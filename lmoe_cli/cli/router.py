"""`lmoe router`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.lazy import Entry, LazyGroup
from lmoe_cli.cli.output import Output
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.loadout.loadout import Loadout

VERBS = {
    "grow": Entry("lmoe_cli.cli.router:grow", "Add an expert to a trained gate, without training it again."),
    "shrink": Entry("lmoe_cli.cli.router:shrink", "Take an expert from a trained gate."),
}


@click.group(cls=LazyGroup, entries=VERBS)
def router() -> None:
    """Change the experts of a trained gate, without training it again."""


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--expert", required=True, type=params.TEXT, metavar="NAME=REF", help="The new expert.")
@click.option("--out", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--example", "examples", multiple=True, type=params.TEXT, help="A prompt that it is for; repeatable.")
@click.option("--data", type=params.TEXT, metavar="FILE", help="A file of such prompts.")
@click.option("--description", default="", type=params.TEXT, help="What it is for, in a sentence.")
@click.option("--accept-base", multiple=True, type=params.TEXT, metavar="NAME", help="A base it may be trained on.")
@params.force
@params.token
@params.trust_remote_code
@params.output
def grow(
    recipe: Path,
    expert: str,
    folder: Path,
    examples: tuple[str, ...],
    data: str | None,
    description: str,
    accept_base: tuple[str, ...],
    force: bool,
    token: str | None,
    trust_remote_code: bool,
    out: Output,
) -> None:
    """Add an expert to a trained gate, without training it again.

    Its rows are the directions that its weights amplify most, as strong as those of the others are on average. What the
    gate scores for the others stays as it is. The texts tell which of the two ways of a direction is meant. The folder
    gets the gate and a recipe for it.
    """
    from lmoe_cli.regrow.loadouts import require_elsewhere, with_expert

    name, equals, ref = expert.partition("=")
    if not (name and equals and ref):
        raise UsageError("usage", f"--expert {expert}: not NAME=REF", hint="--expert bard=./adapters/bard")
    entry: dict[str, Any] = {"adapter": ref, "examples": list(examples), "data": data, "description": description}
    entry["accept_base"] = list(accept_base)
    old = _old(recipe, folder, token, force=force, trust_remote_code=trust_remote_code)
    new = with_expert(old, name, entry, token=token)
    require_elsewhere(new, folder)
    _fetch(out, old, new, trust_remote_code=trust_remote_code)
    from lmoe_cli.regrow import change

    told = change.grow(old, new, folder, force=force, trust_remote_code=trust_remote_code)
    count = told["texts"]
    texts = f"the sign of its rows is from {count} text{'s' if count > 1 else ''}"
    by = texts if count else "no text tells the sign of its rows: --example, --data or --description would"
    out.say(f"{folder}: {name} joined at {told['places'] - len(told['idle_at'])} of {told['places']} places; {by}")
    _end(out, told)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("name", type=params.TEXT)
@click.option("--out", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@params.force
@params.token
@params.trust_remote_code
@params.output
def shrink(
    recipe: Path, name: str, folder: Path, force: bool, token: str | None, trust_remote_code: bool, out: Output
) -> None:
    """Take an expert from a trained gate.

    What the gate scores for the others stays as it is, and they share what NAME got. The folder gets the gate and a
    recipe for it.
    """
    from lmoe_cli.regrow.loadouts import without_expert

    old = _old(recipe, folder, token, force=force, trust_remote_code=trust_remote_code)
    new = without_expert(old, name)
    _fetch(out, old, new, trust_remote_code=trust_remote_code)
    from lmoe_cli.regrow import change

    told = change.shrink(old, new, folder, force=force, trust_remote_code=trust_remote_code)
    out.say(f"{folder}: {name} left at {told['places'] + len(told['dropped_at'])} places")
    _end(out, told)


def _old(path: Path, folder: Path, token: str | None, *, force: bool, trust_remote_code: bool) -> Loadout:
    """The loadout with its gate, as it was trained."""
    from lmoe_cli.files import refuse_existing
    from lmoe_cli.loadout.loadout import resolve
    from lmoe_cli.loadout.parse import read_recipe
    from lmoe_cli.regrow.loadouts import require_elsewhere, require_gate

    refuse_existing(folder, force=force)
    loadout = resolve(read_recipe(path), str(path), beside=path.parent, token=token)
    require_gate(loadout, trust_remote_code=trust_remote_code)
    require_elsewhere(loadout, folder)
    return loadout


def _fetch(out: Output, old: Loadout, new: Loadout, *, trust_remote_code: bool) -> None:
    """Check the loadout with other experts, and bring both onto this machine."""
    from lmoe_cli.check import require

    out.warn(require(new, trust_remote_code=trust_remote_code).findings)
    with bar(out, "fetching") as fetched:
        old.fetch(fetched)
        new.fetch(fetched)


def _end(out: Output, told: dict[str, Any]) -> None:
    out.say(f"next: lmoe check {quote(told['recipe'])}")
    out.finish(told)

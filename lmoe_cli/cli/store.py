"""`lmoe ls` and `lmoe rm`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output, size
from lmoe_cli.errors import LmoeError, UsageError
from lmoe_cli.findings import finding, from_error

if TYPE_CHECKING:
    from lmoe_cli.adapter.store import StoredAdapter

RECIPE_FOLDERS = (Path(), Path("recipes"))


@click.command()
@params.output
def ls(out: Output) -> None:
    """List the adapters and loadouts on this machine.

    Adapters are those in the Hugging Face cache and those that come with lmoe; loadouts are the recipes in this
    folder and in its folder 'recipes'.
    """
    from lmoe_cli import hub
    from lmoe_cli.adapter.store import stored_adapters

    damaged = [finding(error.code, error.where, error.message, error.hint) for error in hub.damaged_repositories()]
    out.warn(damaged)
    found = stored_adapters()
    adapters, loadouts = [_facts(item) for item in found], _loadouts()
    if adapters:
        rows = [
            (item["ref"], (item["revision"] or "")[:8], item["base"], item["rank"], size(item["bytes"]), _state(item))
            for item in adapters
        ]
        out.table("", ("adapter", "revision", "base", "rank", "size", ""), rows)
    if loadouts:
        columns = ("path", "name", "base", "experts")
        out.table("", ("loadout", *columns[1:]), [[item[column] for column in columns] for item in loadouts])
    if not adapters and not loadouts:
        out.say("nothing yet: lmoe pull ORG/NAME")
    findings = [*damaged, *(from_error(item.problem) for item in found if item.problem)]
    out.finish({"adapters": adapters, "loadouts": loadouts}, findings)


def _facts(item: StoredAdapter) -> dict[str, Any]:
    """What ``--json`` tells of an adapter."""
    from lmoe_cli.adapter.summary import summary

    facts = summary(item.adapter) if item.adapter else {}
    return {
        "ref": item.ref,
        "revision": item.revision,
        "refs": list(item.refs),
        "path": str(item.path),
        "demo": item.is_demo,
        "bytes": item.size,
        "base": facts.get("base"),
        "peft_type": facts.get("peft_type"),
        "rank": facts["rank"]["max"] if facts else None,
        "supported": facts.get("supported", False),
        "problem": item.problem.code if item.problem else None,
    }


def _state(item: dict[str, Any]) -> str:
    if item["problem"]:
        return str(item["problem"])
    return "comes with lmoe" if item["demo"] else "" if item["supported"] else "cannot run"


def _loadouts() -> list[dict[str, Any]]:
    from lmoe_cli.loadout.parse import read_recipe

    found = []
    for path in sorted(path for folder in RECIPE_FOLDERS for path in folder.glob("*.y*ml")):
        try:
            recipe = read_recipe(path)
        except LmoeError:  # some other YAML
            continue
        found.append({"path": str(path), "name": recipe.name, "base": recipe.base, "experts": list(recipe.experts)})
    return found


@click.command()
@click.argument("ref")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@params.output
def rm(ref: str, yes: bool, dry_run: bool, out: Output) -> None:
    """Remove an adapter from this machine.

    REF is org/name[@revision] in the Hugging Face cache, which other programs use too.
    """
    from lmoe_cli.adapter.store import find_cached, remove

    cached = find_cached(ref)
    kinds = [_kind(item.folder) for item in cached]  # before they are gone
    rows = [
        (item.name, item.commit[:8], item.refs, kind, size(item.size)) for item, kind in zip(cached, kinds, strict=True)
    ]
    out.table("", ("repository", "revision", "known as", "is", "size"), rows)
    if not dry_run and not yes:
        if out.as_json or not _can_ask():
            raise UsageError("usage", f"{ref}: nobody can be asked whether to remove it", hint="-y removes it unasked")
        click.confirm("Remove it?", abort=True, err=True)
    freed = 0 if dry_run else remove(cached)
    if not dry_run:
        out.say(f"{size(freed)} freed")
    revisions = [
        {"revision": item.commit, "kind": kind, "bytes": item.size} for item, kind in zip(cached, kinds, strict=True)
    ]
    out.finish({"ref": ref, "revisions": revisions, "removed": not dry_run, "bytes": freed})


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _kind(folder: Path) -> str:
    """What a repository is, by the files that every reader of it looks for first."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    return "model" if (folder / "config.json").is_file() else "repository"

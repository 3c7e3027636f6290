"""`lmoe pull`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.inspect import show_adapter, show_base
from lmoe_cli.cli.output import Output, size
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import InvalidFileError, LmoeError, UsageError
from lmoe_cli.findings import Finding, RefusedError, finding, from_error

if TYPE_CHECKING:
    from lmoe_cli.adapter.adapter import Adapter
    from lmoe_cli.loadout.base import Base
    from lmoe_cli.source import Source

RECIPES = (".yaml", ".yml")
UNFETCHABLE = ("pickle-only", "weights-missing")
"""Findings about an adapter of which there is nothing to fetch."""


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="REF|RECIPE…")
@click.option("--with-base", is_flag=True, help="The base too: the recipe's, or the one that the adapter names.")
@click.option("--allow-pickle", is_flag=True, help="Convert pickled weights, after checking what they would do.")
@click.option("--dry-run", is_flag=True, help="Only list the files and their sizes.")
@params.revision
@params.token
@params.output
def pull(
    targets: tuple[str, ...],
    with_base: bool,
    allow_pickle: bool,
    dry_run: bool,
    revision: str | None,
    token: str | None,
    out: Output,
) -> None:
    """Download adapters, or what a recipe names, from the Hub.

    REF is org/name[@revision]; RECIPE is a .yaml file. Only the files that an adapter needs are fetched, into the
    ordinary Hugging Face cache, and each is compared with what the Hub announces of it. Nothing is downloaded when
    one of the adapters is damaged.
    """
    if revision and (len(targets) > 1 or Path(targets[0]).suffix in RECIPES):
        raise UsageError("usage", "--revision needs exactly one REF", hint="write REF@REVISION instead")
    plan = Plan(revision, token, out, with_base=with_base, allow_pickle=allow_pickle, dry_run=dry_run)
    for target in targets:
        with plan.attempt():
            if Path(target).suffix in RECIPES:
                plan.add_recipe(Path(target))
            else:
                plan.add_adapter(target, None, with_base=with_base)
    if plan.problems:
        raise RefusedError("nothing was downloaded", plan.problems, exit_code=plan.exit_code)
    files = [file for wanted in plan.wanted for file in wanted.files]
    if dry_run:
        rows = [(file["ref"], file["name"], size(file["bytes"]), file["cached"]) for file in files]
        out.table("", ("from", "file", "size", "is here"), rows)
    else:
        plan.wanted = [_fetch(wanted, out) for wanted in plan.wanted]
    _tell(plan.wanted, files, out, dry_run=dry_run)


@dataclass(frozen=True)
class Wanted:
    """An adapter, a base or a trained router, and the files to fetch for it."""

    source: Source
    names: tuple[str, ...]
    adapter: Adapter | None = None
    base: Base | None = None

    @property
    def files(self) -> list[dict[str, Any]]:
        """What ``--json`` tells of them."""
        source = self.source
        return [
            {"ref": source.ref, "name": name, "bytes": source.sizes[name], "cached": source.local(name) is not None}
            for name in self.names
        ]


class Plan:
    """What is to be fetched, read from headers alone, and every reason not to begin."""

    def __init__(
        self,
        revision: str | None,
        token: str | None,
        out: Output,
        *,
        with_base: bool,
        allow_pickle: bool,
        dry_run: bool,
    ) -> None:
        self.revision = revision
        self.token = token
        self.out = out
        self.with_base = with_base
        self.allow_pickle = allow_pickle
        self.dry_run = dry_run
        self.wanted: list[Wanted] = []
        self.problems: list[Finding] = []
        self.exit_code = 0
        """Of the first problem."""

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Go on to the next part when this one cannot be fetched."""
        try:
            yield
        except LmoeError as error:
            self.problems += error.findings if isinstance(error, RefusedError) else [from_error(error)]
            self.exit_code = self.exit_code or error.exit_code

    def add_recipe(self, path: Path) -> None:
        """The adapters and the trained router of a recipe, and its base where that was asked for."""
        from lmoe_cli.loadout.parse import read_recipe
        from lmoe_cli.loadout.routers import GateRouter

        recipe = read_recipe(path)
        for entry in recipe.experts.values():
            with self.attempt():
                self.add_adapter(entry.adapter, path.parent)
        if isinstance(recipe.router, GateRouter):
            with self.attempt():
                self.add_router(recipe.router.artefact, path.parent)
        if self.with_base:
            self.add_base(recipe.base, path.parent)

    def add_adapter(self, ref: str, beside: Path | None, *, with_base: bool = False) -> None:
        """An adapter, and the base it names where that was asked for."""
        from lmoe_cli.adapter.soundness import inspect_adapter

        source = self._open(ref, self.revision, beside)
        adapter = inspect_adapter(source)
        refusals = [item for item in adapter.findings if item.code in UNFETCHABLE]
        if refusals and not (self.allow_pickle and adapter.format == "pickle"):
            raise RefusedError(f"{ref}: cannot be fetched", refusals, exit_code=2)
        self._add(Wanted(source, adapter.files, adapter))
        if with_base:
            self.add_base(_claimed_base(adapter), None)

    def add_base(self, ref: str, beside: Path | None) -> None:
        """A base model."""
        from lmoe_cli.loadout.base import read_base

        source = self._open(ref, None, beside)
        base = read_base(source)
        self._add(Wanted(source, base.files, base=base))

    def add_router(self, ref: str, beside: Path | None) -> None:
        """A trained router."""
        from lmoe_cli.loadout.trained import read_gate

        source = self._open(ref, None, beside)
        self._add(Wanted(source, read_gate(source).files))

    def _open(self, ref: str, revision: str | None, beside: Path | None) -> Source:
        """What a reference means, without those of its files that are here and damaged."""
        from lmoe_cli.source import open_source

        source = open_source(ref, revision=revision, token=self.token, beside=beside)
        for name in source.disregard_damaged() if self.dry_run else source.discard_damaged():
            self.out.say(f"{source.where(name)}: what the cache holds is damaged, to be fetched again")
        return source

    def _add(self, wanted: Wanted) -> None:
        known = {(item.source.ref, item.source.revision) for item in self.wanted}
        if (wanted.source.ref, wanted.source.revision) not in known:
            self.wanted.append(wanted)


def _claimed_base(adapter: Adapter) -> str:
    """The base that an adapter names, as a reference that can only mean the Hub, or what comes with lmoe."""
    from lmoe_cli import hub

    claim = (adapter.config.base if adapter.config else None) or ""
    if claim.startswith("demo:"):
        return claim
    if not hub.NAME.fullmatch(claim):
        message = f"{adapter.ref}: its config names {claim!r} as its base, which is no repository"
        hint = "pull the base by itself, from a recipe that names it"
        raise UsageError("usage", message, hint=hint, where=adapter.ref)
    return f"hf://{claim}"


def _fetch(wanted: Wanted, out: Output) -> Wanted:
    """Bring an adapter or a base onto this machine; pickled weights are converted."""
    from lmoe_cli import hub
    from lmoe_cli.adapter.adapter import PICKLE
    from lmoe_cli.adapter.soundness import inspect_adapter
    from lmoe_cli.source import Remote

    source = wanted.source
    if isinstance(source, Remote) and not source.repository.online:
        out.say(f"{source.ref}: the Hub does not answer; this is what the local cache holds")
    is_new = source.local(PICKLE) is None
    with bar(out, source.ref) as progress:
        source.fetch(wanted.names, progress)
    if not wanted.adapter or wanted.adapter.format != "pickle":
        return wanted
    try:
        _convert(source, out)
    except InvalidFileError as error:
        if error.code == "pickle-refused" and is_new and isinstance(source, Remote):  # nobody shall come upon it later
            hub.discard(source.repository.name, source.require(PICKLE))
        raise
    return Wanted(source, wanted.names, inspect_adapter(source))


def _convert(source: Source, out: Output) -> None:
    from lmoe_cli.adapter.adapter import PICKLE, STEM
    from lmoe_cli.adapter.converted import converted_folder
    from lmoe_cli.checkpoint.pickled import convert

    pickle = source.require(PICKLE)
    folder = converted_folder(pickle)
    if not folder.is_dir():
        convert(pickle, folder, f"{STEM}.safetensors")
    out.say(f"{source.where(PICKLE)}: converted to {folder}")


def _tell(fetched: list[Wanted], files: list[dict[str, Any]], out: Output, *, dry_run: bool) -> None:
    """What came, and what to do next."""
    from lmoe_cli import hub
    from lmoe_cli.adapter.summary import summary as adapter_summary
    from lmoe_cli.loadout.base import summary as base_summary

    findings: list[Finding] = []
    facts: dict[str, list[dict[str, Any]]] = {"adapters": [], "bases": []}
    for wanted in fetched:
        if wanted.base:
            facts["bases"].append(base_summary(wanted.base))
            if not dry_run:
                show_base(out, facts["bases"][-1])
        if wanted.adapter:
            said = [*wanted.adapter.findings, *_unsupported(wanted.adapter)]
            findings += said
            facts["adapters"].append(adapter_summary(wanted.adapter))
            if not dry_run:
                show_adapter(out, facts["adapters"][-1], tuple(said))
    missing = sum(file["bytes"] for file in files if not file["cached"])
    out.say(f"{size(missing)} {'to download' if dry_run else 'downloaded'}")
    for adapter in facts["adapters"]:
        if not facts["bases"] and not dry_run and hub.NAME.fullmatch(adapter["base"] or ""):
            out.say(
                f"next: its base is said to be {adapter['base']}; lmoe pull {adapter['ref']} --with-base fetches it"
            )
    out.finish({**facts, "files": files, "bytes": missing}, findings)


def _unsupported(adapter: Adapter) -> list[Finding]:
    if adapter.is_supported:
        return []
    return [finding("pulled-unsupported", adapter.ref, f"{adapter.ref}: lmoe cannot run this adapter")]

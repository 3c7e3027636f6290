"""A recipe with everything it names found and read: the value that all commands work on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lmoe_cli.adapter.adapter import Adapter
from lmoe_cli.adapter.contents import Part
from lmoe_cli.adapter.soundness import inspect_adapter
from lmoe_cli.adapter.summary import summary as adapter_summary
from lmoe_cli.errors import LmoeError, NotFoundError
from lmoe_cli.findings import Finding, RefusedError, errors, from_error
from lmoe_cli.hub import Progress
from lmoe_cli.loadout.base import Base, read_base
from lmoe_cli.loadout.base import summary as base_summary
from lmoe_cli.loadout.dequantized import dequantized
from lmoe_cli.loadout.layout import Assignment, Layout, Target
from lmoe_cli.loadout.profile import weight_at
from lmoe_cli.loadout.recipe import ExpertEntry, Recipe
from lmoe_cli.loadout.routers import GateRouter, WeightedRouter
from lmoe_cli.loadout.saved import conflicts, is_unread, without_copies
from lmoe_cli.loadout.trained import TrainedGate, about_gate, read_gate
from lmoe_cli.source import Folder, Source, open_source

T = TypeVar("T")


@dataclass(frozen=True)
class Expert:
    """An adapter with a name and a weight inside a loadout."""

    name: str
    adapter: Adapter
    entry: ExpertEntry

    @property
    def weight(self) -> float:
        """The number on this expert's knob at the start. Dimensionless.

        Where the recipe gives rules per module, the knob multiplies them all and starts at 1.
        """
        return self.entry.weight if isinstance(self.entry.weight, float | int) else 1.0

    def profile_at(self, module: str) -> float:
        """What the recipe's rules make of the knob at one module of the base. Dimensionless."""
        return 1.0 if isinstance(self.entry.weight, float | int) else weight_at(self.entry.weight, module)


@dataclass(frozen=True)
class Loadout:
    """A base, the experts on it, and everything else a recipe says."""

    recipe: Recipe
    origin: str
    """The recipe's file, or the command line."""
    base: Base
    experts: tuple[Expert, ...]
    gate: TrainedGate | None = None
    """The trained gate that the recipe's router names."""
    folder: Path | None = None
    """Of the recipe's file: where files that it names are looked for."""

    def expert(self, name: str) -> Expert:
        """The expert of a name.

        Raises:
            NotFoundError: There is none.
        """
        found = {expert.name: expert for expert in self.experts}
        if name not in found:
            close = get_close_matches(name, found, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"experts: {', '.join(found) or 'none'}"
            raise NotFoundError("expert-unknown", f"no expert '{name}'", hint=hint)
        return found[name]

    @cached_property
    def assignments(self) -> Mapping[str, tuple[list[Assignment], list[Part]]]:
        """Expert's name → its parts on the matrices of the base, and the parts that have no place there."""
        layout = self._layout
        found: dict[str, tuple[list[Assignment], list[Part]]] = {}
        for expert in self.experts:
            placed: list[Assignment] = []
            homeless: list[Part] = []
            for part in expert.adapter.parts.values():
                assigned = layout.assign(part)
                placed += assigned
                if not assigned:
                    homeless.append(part)
            found[expert.name] = [*placed, *layout.other_ends(placed, is_tied=self.base.is_tied)], homeless
        return found

    @property
    def _layout(self) -> Layout:
        """The base's, with what adapters show of it: where one has the LoRA of an embedding, it is one for all."""
        named = self.base.layout
        parts = [part for expert in self.experts for part in expert.adapter.parts.values() if part.kind == "embedding"]
        looked_up = {name for part in parts if (name := named.tensor(part.module))}
        return Layout(self.base.stored, self.base.text_config, looked_up)

    @cached_property
    def by_target(self) -> Mapping[Target, list[tuple[int, Assignment]]]:
        """Matrix of the base → number of each expert that changes it, and how, in the order of the experts.

        Copies of the base's own tensors change nothing and are left out where both files are on this machine.
        """
        found: dict[Target, list[tuple[int, Assignment]]] = {}
        for number, expert in enumerate(self.experts):
            for item in self.assignments[expert.name][0]:
                if (change := without_copies(item, expert.adapter, self.base)) is not None:
                    found.setdefault(item.target, []).append((number, change))
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what decides the function that is computed: the recipe, and which files it means."""

        def identity(source: Source, stored: Mapping[str, Any]) -> list[Any]:
            place_ = str(source.path.resolve()) if isinstance(source, Folder) else source.ref
            stamps = [path.stat().st_mtime_ns for name in sorted(source.sizes) if (path := source.local(name))]
            return [place_, source.revision, stamps if source.revision is None else [], sorted(stored)]

        parts = [identity(self.base.source, self.base.stored)]
        for expert in self.experts:
            parts.append([expert.name, expert.entry.model_dump(mode="json")])
            parts.append(identity(expert.adapter.source, expert.adapter.stored))
        parts.append([self.recipe.model_dump(mode="json", include={"router", "modules_to_save", "skip_below"})])
        if self.gate:
            parts.append(identity(self.gate.source, self.gate.stored))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def places(self) -> dict[str, Path | None]:
        """Reference of all that it is made of → its folder, where that is on this machine."""
        sources = [self.base.source, *(expert.adapter.source for expert in self.experts)]
        return {source.ref: source.path for source in [*sources, *([self.gate.source] if self.gate else [])]}

    @property
    def published(self) -> Loadout:
        """The same experts as they were published, with weights that turn: without rules, router or trained gate."""
        live = self.live
        experts = tuple(
            replace(expert, entry=expert.entry.model_copy(update={"weight": 1.0})) for expert in self.experts
        )
        entries = {expert.name: expert.entry for expert in experts}
        return replace(live, recipe=live.recipe.model_copy(update={"experts": entries}), experts=experts)

    @property
    def live(self) -> Loadout:
        """The same loadout with weights that are blended at run time, whatever its router says."""
        return replace(
            self, recipe=self.recipe.model_copy(update={"router": WeightedRouter(type="weighted")}), gate=None
        )

    @property
    def dequantized(self) -> Loadout:
        """The same loadout on what a base packed by bitsandbytes stands for. See `loadout.dequantized` for errors."""
        return replace(self, base=dequantized(self.base))

    def fetch(self, progress: Progress | None = None, *, with_base: bool = True) -> None:
        """Bring everything it needs onto this machine.

        Raises:
            RefusedError: Several experts bring a module of their own, which showed only now.
            NotFoundError, AccessError, NetworkError, ResourceError: Something cannot be brought.
        """
        unread = any(
            is_unread(item, expert.adapter, self.base)
            for expert in self.experts
            for item in self.assignments[expert.name][0]
        )
        for expert in self.experts:
            expert.adapter.source.fetch(expert.adapter.files, progress)
        if self.gate:
            self.gate.source.fetch(self.gate.files, progress)
        if with_base:
            self.base.source.fetch(self.base.files, progress)
        found = list(about_gate(self, self.gate)) if self.gate else []
        if unread:
            self.__dict__.pop("by_target", None)  # made before there were bytes to compare
            found += conflicts(self)
        if wrong := errors(found):
            raise RefusedError(f"{self.origin}: the parts do not fit", wrong)


def resolve(recipe: Recipe, origin: str, *, beside: Path | None = None, token: str | None = None) -> Loadout:
    """Find and read, from headers alone, everything a recipe names.

    Args:
        recipe: What was written.
        origin: The recipe's file, for messages.
        beside: Folder of the recipe; folders it names are looked for there first.
        token: For the Hub.

    Raises:
        RefusedError: Something could not be read; its findings tell all that could not. Its exit code is that of the
            first one.
    """
    problems: list[tuple[Finding, int]] = []

    def attempt(read: Callable[[Source], T], ref: str, what: str) -> T | None:
        try:
            return read(open_source(ref, token=token, beside=beside))
        except LmoeError as error:
            found = from_error(error)
            told = Finding(found.code, "error", what, f"{what}: {found.message}", found.hint)
            problems.append((told, error.exit_code))
            return None

    base = attempt(read_base, recipe.base, "base")
    adapters = {name: attempt(inspect_adapter, entry.adapter, name) for name, entry in recipe.experts.items()}
    router = recipe.router
    gate = attempt(read_gate, router.artefact, "router") if isinstance(router, GateRouter) else None
    if base is None or problems:
        message = f"{origin}: {len(problems)} of its parts cannot be read"
        raise RefusedError(message, [found for found, _ in problems], exit_code=problems[0][1])
    experts = [Expert(name, adapter, recipe.experts[name]) for name, adapter in adapters.items() if adapter]
    return Loadout(recipe, origin, base, tuple(experts), gate, beside)


def summary(loadout: Loadout) -> dict[str, Any]:
    """What ``lmoe inspect loadout --json`` tells, under ``data``."""
    recipe = loadout.recipe
    return {
        "name": recipe.name,
        "description": recipe.description,
        "origin": loadout.origin,
        "base": base_summary(loadout.base),
        "experts": {
            expert.name: {
                "weight": expert.entry.model_dump(mode="json")["weight"],
                **adapter_summary(expert.adapter),
            }
            for expert in loadout.experts
        },
        "router": recipe.router.model_dump(mode="json"),
        "bytes": {
            "base": loadout.base.size,
            "experts": sum(expert.adapter.size for expert in loadout.experts),
        },
        "digest": loadout.digest,
    }

"""A recipe as YAML: what `lmoe init` writes and what a chat saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.examples import found_beside
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.recipe import ExpertEntry, Recipe, Weight, WeightRule
from lmoe_cli.loadout.routers import EncoderRouter
from lmoe_cli.loadout.text import is_text
from lmoe_cli.source import Folder, Source

SCHEMA_URL = "https://raw.githubusercontent.com/lmoe/lmoe/main/schemas/loadout-v1.json"
"""Where editors find what a recipe may say."""
ODD_BREAKS = frozenset("\r\x85\u2028\u2029")
"""Line breaks that a reader of YAML turns into ordinary ones, unless they are quoted."""
DIGITS = 10
"""Significant digits of a product of weights: 0.3 x 0.7 is written as 0.21."""


def recipe_text(recipe: Recipe) -> str:
    """Write a recipe as YAML: keys in the order of the model, what is at its default left out.

    Reading the text gives the same recipe.
    """
    data = {"version": recipe.version, **recipe.model_dump(mode="json", exclude_defaults=True)}
    if "router" in data:  # whose type may be at its default
        data["router"] = {"type": recipe.router.type, **data["router"]}
    data["experts"] = {name: _expert(entry) for name, entry in data["experts"].items()}
    body = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return f"# yaml-language-server: $schema={SCHEMA_URL}\n{body}"


def with_weights(recipe: Recipe, weights: Mapping[str, float]) -> Recipe:
    """A recipe with other weights, to write down what was turned while it ran.

    Where an expert has rules per module, the knob multiplies each of them, and is the weight of the modules that no
    rule names.

    Args:
        recipe: What to change.
        weights: Expert's name → its knob; experts that are not named keep theirs.

    Raises:
        UsageError: A weight is beyond what a recipe can hold.
    """
    experts = {
        name: entry.model_copy(update={"weight": _turned(name, entry.weight, weights[name])})
        if name in weights
        else entry
        for name, entry in recipe.experts.items()
    }
    return recipe.model_copy(update={"experts": experts})


def moved(loadout: Loadout, folder: Path) -> Recipe:
    """The recipe of a loadout, as it must read in another folder to mean the same places.

    Args:
        loadout: Knows where its parts were found.
        folder: That will hold the file.
    """
    recipe, router = loadout.recipe, loadout.recipe.router
    experts = {expert.name: _moved_entry(expert, loadout.folder, folder) for expert in loadout.experts}
    changes: dict[str, Any] = {"base": _from(folder, loadout.base.source), "experts": experts}
    if loadout.gate:
        changes["router"] = router.model_copy(update={"artefact": _from(folder, loadout.gate.source)})
    if isinstance(router, EncoderRouter) and router.encoder:
        changes["router"] = router.model_copy(update={"encoder": _moved(router.encoder, loadout.folder, folder)})
    return recipe.model_copy(update=changes)


def _moved_entry(expert: Expert, before: Path | None, folder: Path) -> ExpertEntry:
    changes: dict[str, Any] = {"adapter": _from(folder, expert.adapter.source)}
    if expert.entry.data:
        changes["data"] = _moved(expert.entry.data, before, folder)
    return expert.entry.model_copy(update=changes)


def _moved(name: str, before: Path | None, folder: Path) -> str:
    """A file or folder that a recipe names, as another folder's must name it; what is not there as before."""
    found = found_beside(name, before)
    return _placed(folder, found) if found.exists() and not name.startswith("~") else name


def _turned(name: str, weight: Weight, knob: float) -> Weight:
    if not isinstance(weight, list):
        return number_of(name, knob)
    if knob == 1:
        return weight
    rules = [WeightRule(match=rule.match, value=number_of(name, rule.value * knob)) for rule in weight]
    if any(rule.match == "*" for rule in weight):
        return rules
    return [*rules, WeightRule(match="*", value=number_of(name, knob))]


def number_of(name: str, value: float) -> float:
    """A weight as a recipe holds it.

    Args:
        name: Of the expert.
        value: As computed.

    Raises:
        UsageError: It is beyond what a recipe can hold.
    """
    if not abs(value) <= 100:
        hint = "a recipe takes weights from -100 to 100"
        raise UsageError("weight-invalid", f"{name}: {value:g} is no weight of a recipe", hint=hint)
    return float(f"{value:.{DIGITS}g}")


def _from(folder: Path, source: Source) -> str:
    """How a file in ``folder`` names a source. Below it relative, elsewhere absolute; what is no folder as before."""
    if not isinstance(source, Folder) or source.ref.startswith(("demo:", "~")):
        return source.ref
    return _placed(folder, source.path)


def _placed(folder: Path, path: Path) -> str:
    place, folder = path.absolute(), folder.absolute()
    if folder in place.parents and ".." not in place.parts:
        return f"./{place.relative_to(folder).as_posix()}"
    return str(place)


class _OneLine(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Writes what `text.parse_yaml` reads: YAML 1.2's core schema, while PyYAML thinks in 1.1."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        del indentless  # items of a list stand under their key, indented
        super().increase_indent(flow, indentless=False)

    def text(self, value: str) -> yaml.Node:
        style = "|" if "\n" in value else None
        if not is_text(value) or not ODD_BREAKS.isdisjoint(value):
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def one_line(self, value: _OneLine) -> yaml.Node:
        return self.represent_mapping("tag:yaml.org,2002:map", value, flow_style=True)


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_representer(_OneLine, _Dumper.one_line)


def _expert(entry: dict[str, Any]) -> dict[str, Any]:
    weight = entry.get("weight")
    return {**entry, "weight": [_OneLine(rule) for rule in weight]} if isinstance(weight, list) else entry

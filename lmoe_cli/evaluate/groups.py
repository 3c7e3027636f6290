"""Parts of a base that get weights of their own: groups of neighbouring layers, and what is in no layer.

Each expert is split into one expert per group, with the parts that it has there. Fixed weights of these are weights per
expert and group, and nothing else has to know of groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lmoe_cli.adapter.contents import Part
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.profile import matches
from lmoe_cli.loadout.recipe import Take, WeightRule

REST = "*"
"""Pattern of what no other group has."""
NUMBERED = re.compile(r"(?:^|\.)([A-Za-z_]\w*)\.(\d+)\.")
"""The first list of modules in a name, and the number in it: the layers."""
DIGITS = 4
"""Significant digits of a weight that was found."""


@dataclass(frozen=True)
class Split:
    """A loadout whose experts are split into groups."""

    loadout: Loadout
    """With an expert for each part."""
    parts: tuple[tuple[str, str], ...]
    """Of each of these experts, which expert it is a part of, and the pattern of its group."""


def layer_groups(loadout: Loadout, count: int) -> list[str]:
    """Patterns of a recipe's rules, one per group of layers.

    Args:
        loadout: Its experts' names of modules tell how the base calls its layers.
        count: How many groups.

    Raises:
        UsageError: There are not as many layers.
    """
    found = [
        (match[1], int(match[2])) for expert in loadout.experts for name in _modules(expert)
        if (match := NUMBERED.search(name))
    ]  # fmt: skip
    layers = max((number for _, number in found), default=-1) + 1
    if not found or layers < count:
        message = f"{count} groups of the {layers} layers that experts act on"
        raise UsageError("usage", message, hint=f"--groups {max(1, layers)} or less")
    name = max({word for word, _ in found}, key=lambda word: sum(word == other for other, _ in found))
    edges = [round(number * layers / count) for number in range(count + 1)]
    return [f"{name}.{start}" if stop - start == 1 else f"{name}.{start}-{stop - 1}" for start, stop in pairwise(edges)]


def split(loadout: Loadout, patterns: Sequence[str]) -> Split:
    """Split experts into groups.

    Args:
        loadout: As published; see `Loadout.published`.
        patterns: Of the groups; what none of them names is a group of its own.
    """
    policy = loadout.recipe.modules_to_save
    experts: list[Expert] = []
    parts: list[tuple[str, str]] = []
    for expert in loadout.experts:
        drops_saved = isinstance(policy, Take) and policy.take != expert.name
        own: dict[str, dict[str, Part]] = {}
        for key, part in expert.adapter.parts.items():
            if not (drops_saved and part.kind == "saved"):
                own.setdefault(group_of(part.module, patterns), {})[key] = part
        for pattern in [*patterns, REST]:
            if pattern in own:
                adapter = replace(expert.adapter, parts=own[pattern])
                experts.append(Expert(f"{expert.name}@{len(parts)}", adapter, expert.entry))
                parts.append((expert.name, pattern))
    # Nothing is skipped: a weight that comes near to 0 has to feel where it should go.
    changes = {"modules_to_save": "blend", "skip_below": 0.0}
    recipe = loadout.recipe.model_copy(update=changes)
    return Split(replace(loadout, recipe=recipe, experts=tuple(experts)), tuple(parts))


def group_of(module: str, patterns: Sequence[str]) -> str:
    """The group that a module is in: the first pattern that matches, as in a recipe."""
    return next((pattern for pattern in patterns if matches(pattern, module)), REST)


def starts(loadout: Loadout, split_: Split) -> list[float]:
    """What a recipe says of each part: its weight there, averaged over the part's modules.

    Args:
        loadout: Of the recipe, with its rules.
        split_: The same, split.
    """
    by_name = {expert.name: expert for expert in loadout.experts}
    found = []
    for (name, _), part in zip(split_.parts, split_.loadout.experts, strict=True):
        expert, modules = by_name[name], _modules(part)
        found.append(expert.weight * sum(map(expert.profile_at, modules)) / len(modules))
    return found


def weights_of(parts: Sequence[tuple[str, str]], values: Sequence[float]) -> dict[str, float | list[WeightRule]]:
    """What a recipe says for weights that were found: a number per expert, or a rule per group.

    Args:
        parts: See `Split`.
        values: The weight of each.
    """
    found: dict[str, list[WeightRule]] = {}
    for (name, pattern), value in zip(parts, values, strict=True):
        found.setdefault(name, []).append(WeightRule(match=pattern, value=rounded(value)))
    return {
        name: rules[0].value if all(rule.match == REST for rule in rules) else rules for name, rules in found.items()
    }


def rounded(value: float) -> float:
    """A weight as it is written."""
    return float(f"{value:.{DIGITS}g}")


def _modules(expert: Expert) -> list[str]:
    return [part.module for part in expert.adapter.parts.values()]

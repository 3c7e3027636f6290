"""Weights that differ between the modules of a base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from lmoe_cli.loadout.recipe import WeightRule

RANGE = re.compile(r"(\d+)-(\d+)\Z")
UNMATCHED = 1.0
"""The weight of a module that no rule names."""


def matches(pattern: str, module: str) -> bool:
    """Whether a rule's pattern names a module.

    The pattern's parts, split at dots, must match consecutive parts of the module's name. A part is a word, a glob
    such as ``*_proj``, or a range of numbers such as ``0-11``, both ends included.

    Args:
        pattern: ``mlp``, ``*.q_proj``, ``layers.0-11``, ``layers.3.mlp``, or ``*``.
        module: Full dotted name.
    """
    wanted, parts = pattern.split("."), module.split(".")
    if wanted[0] == "*" and len(wanted) > 1:  # "*.q_proj" also names a q_proj that stands first
        wanted = wanted[1:]
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(_part_matches, wanted, parts[start:])) for start in starts)


def _part_matches(wanted: str, part: str) -> bool:
    if numbers := RANGE.match(wanted):
        return part.isdigit() and int(numbers[1]) <= int(part) <= int(numbers[2])
    return fnmatchcase(part, wanted)


def weight_at(rules: Sequence[WeightRule], module: str) -> float:
    """The weight that the first matching rule gives a module; 1 where none matches."""
    return next((rule.value for rule in rules if matches(rule.match, module)), UNMATCHED)

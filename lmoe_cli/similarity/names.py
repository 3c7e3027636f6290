"""Modules matched by name, and what of an adapter is known about them without the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from lmoe_cli.adapter.contents import Part
from lmoe_cli.adapter.soundness import UNSCALED
from lmoe_cli.loadout.layout import module_key

FACTORED = ("lora", "embedding", "loha", "lokr")
"""Kinds of parts that hold a low-rank product by themselves. VeRA's projections are cut to sizes that only the base
tells, IA3 scales the base's own matrix, and a module saved whole means its distance from that matrix."""


@dataclass(frozen=True)
class Left:
    """What is left of an adapter's parts where their base is not at hand."""

    parts: tuple[Part, ...]
    """With a low-rank product and nothing that needs the base."""
    cut: tuple[str, ...]
    """Modules of which the low-rank product is only a part of the delta."""
    skipped: tuple[str, ...]
    """Modules without a low-rank product that is known."""


def left_of(parts: Collection[Part]) -> Left:
    """Take from parts what needs the base."""
    left: list[Part] = []
    cut: list[str] = []
    skipped: list[str] = []
    for part in parts:
        if part.kind not in FACTORED:
            if part.tensors.keys() != {"saved_bias"}:
                skipped.append(part.module)
            continue
        if part.tensors.keys() & {"magnitude", "saved_weight"}:
            cut.append(part.module)
        tensors = {role: tensor for role, tensor in part.tensors.items() if role not in UNSCALED}
        left.append(replace(part, tensors=tensors))
    return Left(tuple(left), tuple(cut), tuple(skipped))


def key_of(parts: Sequence[Part]) -> Mapping[str, str]:
    """Module → the name it is matched by: without wrappers in front, unless that would make two modules one."""
    counts = Counter(module_key(part.module) for part in parts)
    return {part.module: key if counts[key := module_key(part.module)] == 1 else part.module for part in parts}

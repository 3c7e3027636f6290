"""What a comparison came to, as plain values: over all, by kind of module, by layer and by matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import combinations
from operator import add
from typing import Any, TypeVar

from lmoe_cli.adapter.summary import summary
from lmoe_cli.similarity.compare import Sums
from lmoe_cli.similarity.plan import Changed, Plan

K = TypeVar("K")
SIDES = ("input", "output")


def report(plan: Plan, measured: Iterable[tuple[Changed, Sums]]) -> dict[str, Any]:
    """What ``lmoe similarity --json`` tells, under ``data``.

    Args:
        plan: What was compared.
        measured: What `compare.compare` gives.

    Returns:
        ``adapters`` by name, ``base``, and the same measures ``overall``, in ``kinds``, ``layers`` and ``matrices``.
    """
    found = list(measured)
    names = [expert.name for expert in plan.experts]
    overall = measures(names, _total(sums for _, sums in found))
    return {
        "adapters": {
            expert.name: _adapter(summary(expert.adapter)) | {"norm": overall["norms"][expert.name]}
            for expert in plan.experts
        },
        "base": plan.loadout.base.ref if plan.loadout else None,
        "overall": overall,
        "kinds": [{"kind": kind} | measures(names, sums) for kind, sums in _by(found, lambda item: item.kind)],
        "layers": [{"layer": layer} | measures(names, sums) for layer, sums in _by(found, lambda item: item.layer)],
        "matrices": [
            {"module": changed.module, "shape": [changed.d_out, changed.d_in]} | measures(names, sums)
            for changed, sums in found
        ],
    }


def _adapter(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("ref", "revision", "base", "peft_type", "rank", "variants", "modules")}


def _total(sums: Iterable[Sums]) -> Sums:
    return reduce(add, sums)


def _by(found: Sequence[tuple[Changed, Sums]], key: Callable[[Changed], K]) -> list[tuple[K, Sums]]:
    groups: dict[K, list[Sums]] = {}
    for changed, sums in found:
        groups.setdefault(key(changed), []).append(sums)
    return [(name, _total(own)) for name, own in groups.items()]


def measures(names: Sequence[str], sums: Sums) -> dict[str, Any]:
    """Norms and pairs of some matrices.

    Returns:
        ``matrices`` (count), ``norms`` (name → Frobenius norm, None where it changes none of them) and ``pairs``, each
        with ``first, second, shared`` (matrices that both change), ``cosine`` (over all matrices), ``cosine_shared``
        (over those that both change), and per side ``overlap_…`` and ``chance_…`` (what random subspaces of the same
        ranks have). None stands for what is not defined, such as the cosine of a delta that is zero.
    """
    norms = {
        name: math.sqrt(max(0.0, float(sums.inner[number, number]))) if sums.shared[number, number] else None
        for number, name in enumerate(names)
    }
    pairs = [_pair(names, sums, one, two) for one, two in combinations(range(len(names)), 2)]
    return {"matrices": sums.matrices, "norms": norms, "pairs": pairs}


def _pair(names: Sequence[str], sums: Sums, one: int, two: int) -> dict[str, Any]:
    inner, most = float(sums.inner[one, two]), float(sums.most[one, two])
    told: dict[str, Any] = {
        "first": names[one],
        "second": names[two],
        "shared": int(sums.shared[one, two]),
        "cosine": _cosine(inner, float(sums.inner[one, one]), float(sums.inner[two, two])),
        "cosine_shared": _cosine(inner, float(sums.squares[one, two]), float(sums.squares[two, one])),
    }
    for number, side in enumerate(SIDES):
        for name, values in (("overlap", sums.near), ("chance", sums.chance)):
            told[f"{name}_{side}"] = min(1.0, float(values[number, one, two]) / most) if most else None
    return told


def _cosine(inner: float, first: float, second: float) -> float | None:
    if first <= 0 or second <= 0:
        return None
    return max(-1.0, min(1.0, inner / (math.sqrt(first) * math.sqrt(second))))

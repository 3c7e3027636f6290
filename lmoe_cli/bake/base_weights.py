"""What a bake on a base that is stored quantised starts from, and what that changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from lmoe_cli.bake.original import distances
from lmoe_cli.bake.report import file_hashes
from lmoe_cli.checkpoint.packed import Packed
from lmoe_cli.loadout.base import Base
from lmoe_cli.loadout.loadout import Loadout


@dataclass(frozen=True)
class BaseWeights:
    """A choice of the weights that experts are added to."""

    loadout: Loadout
    """To be baked."""
    meaning: str
    """What the choice changes, for a person."""
    facts: Mapping[str, Any]
    """What the report tells of it."""


def from_dequantized(loadout: Loadout) -> BaseWeights:
    """Start from what packed matrices stand for.

    Args:
        loadout: Taken as dequantised.
    """
    base = loadout.base
    meaning = (
        f"the weights are what the {_kinds(base)} weights of {base.ref} stand for: this is the model that ran "
        "quantised, up to one rounding and to how coarsely quantised products compute"
    )
    return BaseWeights(loadout, meaning, {"choice": "dequantized", "meaning": meaning, "stored_as": _kinds(base)})


def from_original(
    loadout: Loadout, original: Base, names: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> BaseWeights:
    """Start from the model that was quantised, and measure how far it is from what ran.

    Args:
        loadout: Taken as dequantised.
        original: Its files are on this machine.
        names: See `original.require_same_layout`.
        advance: Told the bytes of the original that were compared.

    Raises:
        RefusedError: Its weights are not those that were packed.
    """
    base = loadout.base
    found = distances(base, original, names, advance)
    worst, mean = max(found, key=lambda item: item.distance), fmean(item.distance for item in found)
    meaning = (
        f"the weights are those of {original.ref}: this is not the model that ran quantised. What the {_kinds(base)} "
        f"weights of {base.ref} stand for is {mean:.2%} away on average over {len(found)} matrices, at most "
        f"{worst.distance:.2%} in {worst.name}"
    )
    facts = {
        "choice": "original",
        "meaning": meaning,
        "stored_as": _kinds(base),
        "quantized": {
            "ref": base.ref,
            "revision": base.source.revision,
            "sha256": file_hashes(base.source, base.weight_files),
        },
        "distance": {
            "mean": mean,
            "worst": worst.distance,
            "worst_in": worst.name,
            "tensors": {item.name: item.distance for item in found},
        },
    }
    return BaseWeights(replace(loadout, base=original), meaning, facts)


def _kinds(base: Base) -> str:
    return ", ".join(sorted({tensor.kind for tensor in base.stored.values() if isinstance(tensor, Packed)}))

"""What a bake was made of: the part of its report that a reader can check against the sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmoe_cli.adapter.adapter import Adapter
from lmoe_cli.adapter.config import CONFIG
from lmoe_cli.bake.plan import Plan
from lmoe_cli.bake.write import Written
from lmoe_cli.errors import LmoeError
from lmoe_cli.hashes import sha256
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.saved import is_left_out
from lmoe_cli.source import Source


def facts(loadout: Loadout, plan: Plan, written: list[Written], base_hashes: dict[str, str]) -> dict[str, Any]:
    """What went in and what came out, with every tensor of every adapter accounted for.

    Args:
        loadout: What was baked.
        plan: How.
        written: What came of it.
        base_hashes: See `file_hashes`, of the base's weight files.

    Raises:
        LmoeError: A tensor of an adapter was not used, which is a bug.
    """
    changed = sum(len(file.tensors) for file in written)
    total = sum(len(outputs) for outputs in plan.files.values())
    return {
        **experts_facts(loadout, base_hashes),
        "changed": changed,
        "copied": total - changed,
        "bytes": plan.size,
        "files": {file.name: file.sha256 for file in written},
    }


def experts_facts(loadout: Loadout, base_hashes: dict[str, str]) -> dict[str, Any]:
    """Recipe, revisions and hashes of what went in. See `facts`."""
    from importlib.metadata import version

    return {
        "schema": "lmoe.bake-report/1",
        "lmoe": version("lmoe-cli"),
        "recipe": loadout.recipe.model_dump(mode="json", exclude_defaults=True),
        "method": loadout.recipe.bake.method,
        "weights": {expert.name: expert.weight for expert in loadout.experts},
        "base": {
            "ref": loadout.base.ref,
            "revision": loadout.base.source.revision,
            "sha256": base_hashes | _config_hash(loadout.base.source, "config.json"),
        },
        "experts": {expert.name: _expert(loadout, expert) for expert in loadout.experts},
    }


def _expert(loadout: Loadout, expert: Expert) -> dict[str, Any]:
    adapter = expert.adapter
    used, left_out = _used(loadout, expert)
    if missed := set(adapter.stored) - used - left_out:
        raise LmoeError("tensor-dropped", f"{expert.name}: {min(missed)} was not used", hint="report this as a bug")
    return {
        "ref": adapter.ref,
        "revision": adapter.source.revision,
        "sha256": file_hashes(adapter.weights, _weight_files(adapter)) | _config_hash(adapter.source, CONFIG),
        "tensors": len(adapter.stored),
        "matched": len(used & set(adapter.stored)),
        "left_out": sorted(left_out),
        "modules": len(adapter.parts),
    }


def _used(loadout: Loadout, expert: Expert) -> tuple[set[str], set[str]]:
    """Names of tensors that act, and of those in whose place the recipe takes another expert's."""
    names: tuple[set[str], set[str]] = ({tensor.name for tensor in expert.adapter.shared.values()}, set())
    for item in loadout.assignments[expert.name][0]:
        names[is_left_out(loadout, expert.name, item.part)].update(one.name for one in item.part.tensors.values())
    return names


def _weight_files(adapter: Adapter) -> tuple[str, ...]:
    return tuple(sorted({tensor.file for tensor in adapter.stored.values()}))


def _config_hash(source: Source, name: str) -> dict[str, str]:
    """What says how the weights act, such as alpha, where there is such a file."""
    return file_hashes(source, (name,)) if source.has(name) else {}


def file_hashes(source: Source, names: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of files, in hexadecimal. Those in the Hub's cache are named by it and were checked on arrival."""
    return {name: _announced(source.require(name)) or sha256(source.require(name)) for name in names}


def _announced(path: Path) -> str | None:
    blob = path.resolve()
    is_blob = blob.parent.name == "blobs" and len(blob.name) == 64
    return blob.name if is_blob else None

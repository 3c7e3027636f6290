"""Add an expert to a trained gate, or take one away, and write the gate with a recipe for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_cli import files
from lmoe_cli.bank.bank import Bank, build_bank
from lmoe_cli.engine.base_model import load_model, load_tokenizer
from lmoe_cli.engine.build import share_of
from lmoe_cli.engine.device import choose_dtype
from lmoe_cli.engine.generate import context_of
from lmoe_cli.loadout.examples import texts_of
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.routers import GateRouter
from lmoe_cli.loadout.trained import TrainedGate, read_gate, weights_hash
from lmoe_cli.loadout.write import moved, recipe_text
from lmoe_cli.regrow.places import acts_at, before, direction_at, means_seen
from lmoe_cli.regrow.rows import Rows, added, alone, experts_of, idle, signed, without
from lmoe_cli.router.gate import read_gates
from lmoe_cli.router.store import write_gate
from lmoe_cli.source import Folder

RECIPE = "recipe.yaml"
CPU = torch.device("cpu")


def grow(
    old: Loadout, new: Loadout, out: Path, *, force: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Add the last expert of a loadout to the trained gate of the others.

    Args:
        old: With the gate; checked, its files are on this machine.
        new: The same base and experts, and one more, with fixed weights; checked, its files are on this machine.
        out: Folder to be made.
        force: Replace what stands there.
        trust_remote_code: Let the base run code of its repository.

    Returns:
        What was done.

    Raises:
        InvalidFileError: The gate is damaged, or its places cannot be told from those of the new loadout.
        UsageError: ``out`` exists.
    """
    gate, expert = _gate(old), new.experts[-1]
    texts = texts_of(expert, new.folder)
    model, was, bank = _loaded(old, new, trust_remote_code=trust_remote_code)
    rows = _rows(gate, was, old)
    zero = gate.settings.zero_expert
    strength = sum(experts_of(own, zero_expert=zero).strength for own in rows.values()) / max(len(rows), 1)
    seen: Mapping[str, Tensor] = {}
    if texts:
        tokenizer = load_tokenizer(new.base, trust_remote_code=trust_remote_code)
        context = context_of(model.config)
        tokens = [tokenizer(text)["input_ids"][:context] for text in texts]
        seen = means_seen(model, bank, [one for one in tokens if one])
    grown: dict[str, Rows] = {}
    number = len(old.experts)
    router = old.recipe.router
    assert isinstance(router, GateRouter), "it has a gate"
    temperature = gate.settings.changed_by(router).temperature  # as it runs
    places = before(was, bank)
    for name, place in bank.places.items():
        direction = signed(direction_at(place, number), seen.get(name))
        if (known := places[name]) is None:
            grown[name] = alone(number, direction, strength, zero_expert=zero)
        elif acts_at(bank, name, number):
            grown[name] = added(rows[known], direction, zero_expert=zero)
        else:
            grown[name] = idle(rows[known], temperature, zero_expert=zero)
    told = {
        "added": expert.name,
        "texts": len(texts),
        "alone_at": [name for name in grown if places[name] is None],
        "idle_at": [name for name in grown if places[name] and not acts_at(bank, name, number)],
    }
    return _write(gate, old, new, grown, told, out, force=force)


def shrink(
    old: Loadout, new: Loadout, out: Path, *, force: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Take one expert from a trained gate.

    Args:
        old: See `grow`.
        new: The same without one expert, with fixed weights; checked, its files are on this machine.
        out: See `grow`.
        force: See `grow`.
        trust_remote_code: See `grow`.

    Returns:
        What was done.

    Raises:
        InvalidFileError, UsageError: See `grow`.
    """
    gate = _gate(old)
    names = [expert.name for expert in old.experts]
    (gone,) = set(names) - {expert.name for expert in new.experts}
    _, was, bank = _loaded(old, new, trust_remote_code=trust_remote_code)
    rows = _rows(gate, was, old)
    places = before(was, bank)
    shrunk = {name: without(rows[known], names.index(gone)) for name, known in places.items() if known}
    told = {"removed": gone, "dropped_at": sorted(rows.keys() - set(places.values()))}
    return _write(gate, old, new, shrunk, told, out, force=force)


def _gate(loadout: Loadout) -> TrainedGate:
    assert loadout.gate is not None, "it was looked at before"
    return loadout.gate


def _loaded(old: Loadout, new: Loadout, *, trust_remote_code: bool) -> tuple[nn.Module, Bank, Bank]:
    """The base, and the banks of both loadouts, which tell the names of places."""
    dtype = choose_dtype(None, new.base.runs_in, new.base.size, CPU)
    model, share = load_model(new.base, dtype=dtype, device=CPU, trust_remote_code=trust_remote_code), share_of(old)
    return model, build_bank(model, old, dtype, share), build_bank(model, new, dtype, share)


def _rows(gate: TrainedGate, bank: Bank, loadout: Loadout) -> dict[str, Rows]:
    """Rows of each place, in the order of the loadout's experts."""
    names = [expert.name for expert in loadout.experts]
    found = read_gates(gate, gate.settings, bank.places.values(), names, CPU)
    return {name: Rows(own.weight.detach(), own.bias.detach()) for name, own in found.items()}


def _write(
    gate: TrainedGate,
    old: Loadout,
    new: Loadout,
    rows: dict[str, Rows],
    told: dict[str, Any],
    out: Path,
    *,
    force: bool,
) -> dict[str, Any]:
    hashes = {expert.name: weights_hash(expert.adapter) or "" for expert in new.experts}
    earlier = gate.metrics.get("regrown")  # anybody may have written there
    metrics = {**gate.metrics, "regrown": [*(earlier if isinstance(earlier, list) else []), told]}
    router = old.recipe.router.model_copy(update={"artefact": "."})
    recipe = moved(new, out).model_copy(update={"router": router})
    with files.new_folder(out, force=force) as folder:
        weights = {name: (own.weight, own.bias) for name, own in rows.items()}
        base = (gate.base_name, gate.base)
        write_gate(folder, weights, gate.settings, experts=hashes, base=base, data=gate.data, metrics=metrics)
        files.write_file(folder / RECIPE, recipe_text(recipe).encode())
        read_gate(Folder(str(folder), folder))
    return {"out": str(out), "recipe": str(out / RECIPE), "experts": list(hashes), "places": len(rows), **told}

"""Trained gates with random numbers, and what they compute, spelled out."""

from __future__ import annotations

import functools
import re

import tiny
import torch
from laws.cases import ROOT, case
from safetensors.torch import load_file

from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.trained import GateSettings, fingerprint, weights_hash
from lmoe_cli.router.store import write_gate

NAMES = ("zero", "one", "two", "three")


@functools.cache
def adapter(arch, variant, number):
    """A folder with an adapter of rank 2 + number."""
    folder = ROOT / f"{arch}-{variant}-e{number}"
    tiny.save_adapter(case(arch, "lora").base, variant, folder, seed=number, rank=2 + number)
    return folder


def loadout_of(router, variant="lora", arch="llama", names=NAMES, **entries):
    """A loadout of as many experts as there are names, of ranks 2, 3, 4, …"""
    base = case(arch, "lora").base
    experts = {}
    for number, name in enumerate(names):
        experts[name] = {"adapter": str(adapter(arch, variant, number)), **entries.get(name, {})}
    return resolve(
        Recipe.model_validate({"base": str(base), "experts": experts, "router": router, "skip_below": 0.0}), "a test"
    )


def save_gate(folder, loadout, places, settings, seed=0, scale=1.0, names=None):
    """A gate with random weights at some places.

    Args:
        places: Name → width.
    """
    generator = torch.Generator().manual_seed(seed)
    hashes = {expert.name: weights_hash(expert.adapter) for expert in loadout.experts}
    rows = len(hashes) + settings.zero_expert
    weights = {
        place: (
            scale * torch.randn(rows, width, generator=generator),
            scale * torch.randn(rows, generator=generator),
        )
        for place, width in places.items()
    }
    folder.mkdir(parents=True)
    base = (loadout.base.ref, fingerprint(loadout.base))
    write_gate(folder, weights, settings, experts=hashes, base=base)
    return weights


def places_of(engine):
    return {name: place.width for name, place in engine.bank.places.items()}


def settings(**words):
    return GateSettings.model_validate(words)


def deltas(loadout):
    """Module → for each expert its (s B, A), from the tensors as PEFT saved them."""
    found = {}
    for number, expert in enumerate(loadout.experts):
        stored = load_file(expert.adapter.source.require("adapter_model.safetensors"))
        for key, a in stored.items():
            if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key):
                b = stored[key.replace("lora_A", "lora_B")]
                found.setdefault(match[1], {})[number] = (6 / (2 + number) * b, a)
    return found


def logits_by_hand(loadout, tokens, gates_at):
    """Logits where every linear layer adds the sum over experts of g_e(x) s B A x.

    Args:
        gates_at: Module and its input (B, T, d) → g (B, T, E).
    """
    model = tiny.load(loadout.base.source.path)
    for module, own in deltas(loadout).items():

        def add(layer, inputs, output, module=module, own=own):
            gates = gates_at(module, inputs[0])
            return output + sum(gates[..., number, None] * (inputs[0] @ a.T @ b.T) for number, (b, a) in own.items())

        model.get_submodule(module).register_forward_hook(add)
    with torch.no_grad():
        return model(tokens).logits

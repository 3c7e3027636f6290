"""A tiny talkative base with three experts, and recipes of every router on it."""

from __future__ import annotations

import tiny
import tiny_tokenizer
import torch
from router.made import places_of, save_gate, settings

from lmoe_cli.bank.routed import Place
from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import read_recipe

RECIPE = """\
version: 1
name: tinymage
base: ./base
experts:
  warrior: {adapter: ./warrior, description: "I swing my axe"}
  mage: {adapter: ./mage, weight: 0.5, description: "a spell of fire"}
  healer: {adapter: ./healer, description: "herbs heal wounds"}
skip_below: 0
chat: {temperature: 0, max_new_tokens: 12}
"""
RULES = "[{match: layers.0, value: 0.25}, {match: layers.1.mlp, value: 2.0}]"
ROUTERS = {
    "weighted": "{type: weighted}",
    "static": "{type: static}",
    "encoder": "{type: encoder, temperature: 1.0}",
    "arrow": "{type: arrow, top_k: 2}",
    "gate": "{type: gate, artefact: ./gate}",
    "zero": "{type: gate, artefact: ./zero}",
    "sigmoid": "{type: gate, artefact: ./sigmoid}",
}
GATES = {
    "gate": {"activation": "softmax"},
    "zero": {"activation": "softmax", "zero_expert": True},
    "sigmoid": {"activation": "sigmoid"},
}
NAMES = ("warrior", "mage", "healer")


def build(folder):
    """Write them all; returns the weights of each gate."""
    model = tiny.model("qwen3", max_position_embeddings=160)
    model.model.embed_tokens.weight.data[: len(tiny_tokenizer.SPECIAL)] = 0  # it seldom ends a turn
    model.save_pretrained(folder / "base")
    tiny_tokenizer.save_tokenizer(folder / "base")
    for seed, name in enumerate(NAMES, start=1):
        tiny.save_adapter(folder / "base", "lora", folder / name, seed=seed)
    for name, router in ROUTERS.items():
        (folder / f"{name}.yaml").write_text(f"{RECIPE}router: {router}\n")
    (folder / "rules.yaml").write_text(RECIPE.replace("weight: 0.5", f"weight: {RULES}"))
    plain = resolved(folder / "arrow.yaml")
    places = places_of(start(plain, dtype="float32"))
    return {name: save_gate(folder / name, plain, places, settings(**words), seed=7) for name, words in GATES.items()}


def resolved(path, **weights):
    """A recipe with other weights."""
    recipe = read_recipe(path)
    experts = {
        name: entry.model_copy(update={"weight": weights.get(name, entry.weight)})
        for name, entry in recipe.experts.items()
    }
    return resolve(recipe.model_copy(update={"experts": experts}), str(path), beside=path.parent)


def engine_of(path, **weights):
    return start(resolved(path, **weights), device="cpu", dtype="float32")


def inputs_of(engine, tokens):
    """What flows into the first module of each place, (T, d), seen from outside: name → tensor."""
    found, handles = {}, []
    for name, place in engine.bank.places.items():
        assert isinstance(place, Place)

        def note(_, inputs, name=name):
            found[name] = inputs[0][0].clone()

        handles.append(engine.model.get_submodule(name).register_forward_pre_hook(note))
    with torch.no_grad():
        engine.model(input_ids=torch.tensor([list(tokens)]))
    for handle in handles:
        handle.remove()
    return found

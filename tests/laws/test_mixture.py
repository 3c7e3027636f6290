"""Adapters on the experts of a mixture, in the names that transformers 4 gave them and as fused parameters."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

from laws.cases import assert_close, base, case
from lmoe_cli.bake.model import bake_model
from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

pytestmark = pytest.mark.usefixtures("path")

NAMES = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
}


@pytest.fixture
def one_by_one(request, tmp_path):
    """An adapter as PEFT wrote it when every expert was a linear layer of its own."""
    arch = request.param
    parent, leaves = NAMES[arch]
    config = tiny.model(arch).config
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    width = width if arch == "qwen3_moe" else config.intermediate_size
    torch.manual_seed(4)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for leaf in leaves:
                is_down = leaf in ("down_proj", "w2")
                d_in, d_out = (width, 32) if is_down else (32, width)
                name = f"base_model.model.model.layers.{layer}.{parent}.{expert}.{leaf}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(4, d_in) * 0.2
                tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, 4) * 0.2
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": list(leaves)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base(arch))}))
    return arch, tmp_path


def loadout_of(base_folder, adapter, weight=1.0):
    experts = {"one": {"adapter": str(adapter), "weight": weight}}
    return resolve(Recipe.model_validate({"base": str(base_folder), "experts": experts}), "a test")


@pytest.mark.parametrize("one_by_one", list(NAMES), indirect=True)
def test_experts_named_one_by_one_are_what_peft_makes_of_them(one_by_one):
    arch, adapter = one_by_one
    with torch.no_grad():
        theirs = tiny.peft_model(base(arch), adapter)(tiny.tokens()).logits
    engine = start(loadout_of(base(arch), adapter), device="cpu", dtype="float32")
    assert_close(engine.logits(tiny.tokens()), theirs)


@pytest.mark.parametrize("one_by_one", list(NAMES), indirect=True)
def test_they_bake_into_the_experts_of_the_checkpoint(one_by_one, tmp_path):
    arch, adapter = one_by_one
    loadout = loadout_of(base(arch), adapter, 0.5)
    bake_model(loadout, tmp_path / "baked")
    engine = start(loadout, device="cpu", dtype="float32")
    with torch.no_grad():
        assert_close(tiny.load(tmp_path / "baked")(tiny.tokens()).logits, engine.logits(tiny.tokens()))


@pytest.mark.parametrize("arch", list(NAMES))
def test_a_checkpoint_that_stores_experts_fused_bakes_and_folds_alike(arch, tmp_path):
    own = case(arch, "experts")
    fused = tmp_path / "fused"
    model = tiny.load(own.base)
    model.config.save_pretrained(fused)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    loadout = loadout_of(fused, own.one, 0.7)
    engine = start(loadout, device="cpu", dtype="float32")
    live = engine.logits(tiny.tokens())
    engine.fold()
    assert_close(engine.logits(tiny.tokens()), live)
    bake_model(loadout, tmp_path / "baked")
    with torch.no_grad():
        assert_close(tiny.load(tmp_path / "baked")(tiny.tokens()).logits, live)


def test_a_part_of_the_mixtures_experts_may_be_adapted(tmp_path):
    arch = "qwen3_moe"
    torch.manual_seed(1)
    name = "base_model.model.model.layers.1.mlp.experts.2.up_proj"
    a, b = torch.randn(4, 32) * 0.3, torch.randn(24, 4) * 0.3
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    by_hand = tiny.load(base(arch))
    with torch.no_grad():
        by_hand.model.layers[1].mlp.experts.gate_up_proj[2, 24:] += 2.0 * b @ a
        expected = by_hand(tiny.tokens()).logits
    engine = start(loadout_of(base(arch), tmp_path), device="cpu", dtype="float32")
    assert_close(engine.logits(tiny.tokens()), expected)

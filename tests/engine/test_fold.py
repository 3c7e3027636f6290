"""A folded blend is the live one, and comes off again to the last bit."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import peft
import pytest
import tiny
import torch
from laws.cases import assert_close, case
from safetensors.torch import load_file, save_file

from lmoe_cli.engine import fold
from lmoe_cli.engine.build import start
from lmoe_cli.errors import NotFoundError
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe


def started(loadout, **recipe):
    return start(replace(loadout, recipe=loadout.recipe.model_copy(update=recipe)), device="cpu", dtype="float32")


def by_formula(own, weight):
    """W + g (W_peft - W), in every parameter."""
    model = tiny.load(own.base)
    merged = tiny.peft_model(own.base, own.one).merge_and_unload().state_dict()
    before = model.state_dict()
    model.load_state_dict({name: tensor + weight * (merged[name] - tensor) for name, tensor in before.items()})
    with torch.no_grad():
        return model(tiny.tokens()).logits


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("weight", [0.001, -0.3, 0.7])
def test_an_expert_is_skipped_below_skip_below_and_counts_when_equal(weight, folded):
    own = case("llama", "lora")
    engine = started(own.loadout({"one": weight}), skip_below=abs(weight))
    if folded:
        engine.fold()
    assert_close(engine.logits(tiny.tokens()), by_formula(own, weight))

    engine = started(own.loadout({"one": weight}), skip_below=abs(weight) * 1.001)
    if folded:
        engine.fold()
    with torch.no_grad():
        assert torch.equal(engine.logits(tiny.tokens()), tiny.load(own.base)(tiny.tokens()).logits)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_unfolding_that_failed_is_finished_by_the_next_one(tmp_path):
    own = case("llama", "lora")
    shutil.copytree(own.base, tmp_path / "base")
    loadout = replace(own, base=tmp_path / "base").loadout({"one": 0.6})
    engine = start(loadout, device="cpu", dtype="bfloat16")  # not as stored: so it is no file that is mapped
    before = state(engine.detach())
    engine.attach()
    engine.fold()
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(NotFoundError):
        engine.unfold()
    assert engine.is_folded
    (tmp_path / "away").rename(tmp_path / "base" / "model.safetensors")
    engine.unfold()
    after = engine.detach().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_nothing_is_computed_with_a_base_that_is_unfolded_in_part(tmp_path):
    own = case("llama", "lora")
    shutil.copytree(own.base, tmp_path / "base")
    engine = start(replace(own, base=tmp_path / "base").loadout({"one": 0.6}), device="cpu", dtype="bfloat16")
    live = engine.logits(tiny.tokens())
    engine.fold()
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(NotFoundError), engine.alone():
        pass
    for act in (lambda: engine.logits(tiny.tokens()), engine.fold):
        with pytest.raises(NotFoundError):
            act()
    (tmp_path / "away").rename(tmp_path / "base" / "model.safetensors")
    assert torch.equal(engine.logits(tiny.tokens()), live)


@pytest.mark.parametrize("at", [1, 5])
def test_a_fold_that_is_interrupted_in_the_middle_of_a_matrix_leaves_the_base_as_it_was(monkeypatch, at):
    engine = start(case("llama", "lora").loadout({"one": 0.6}), device="cpu", dtype="bfloat16")
    live, before = engine.logits(tiny.tokens()), state(engine.detach())
    engine.attach()
    calls = itertools.count(1)

    def interrupted(tree, parts, weight, out):
        if next(calls) == at:
            out[: len(out) // 2] = 7.0
            raise KeyboardInterrupt
        write(tree, parts, weight, out)

    write = fold._write
    monkeypatch.setattr(fold, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.fold()
    assert not engine.is_folded
    assert torch.equal(engine.logits(tiny.tokens()), live)
    after = engine.detach().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def loadout_of(base_folder, **experts):
    entries = {name: {"adapter": str(folder), "weight": weight} for name, (folder, weight) in experts.items()}
    return resolve(Recipe.model_validate({"base": str(base_folder), "experts": entries}), "a test")


@pytest.fixture
def fused_and_one_by_one(tmp_path):
    """A base that stores experts fused, an adapter on those, and one that names each expert as transformers 4 did."""
    own = case("mixtral", "experts")
    model = tiny.load(own.base)
    model.config.save_pretrained(tmp_path / "base")
    stored = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del stored["lm_head.weight"]
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(4)
    tensors = {}
    for layer, expert, (leaf, d_in, d_out) in itertools.product(
        range(2), range(4), (("w1", 32, 48), ("w3", 32, 48), ("w2", 48, 32))
    ):
        name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, d_in) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, 4) * 0.2
    (tmp_path / "named").mkdir()
    save_file(tensors, tmp_path / "named" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "named" / "adapter_config.json").write_text(json.dumps(settings))
    return tmp_path / "base", own.one, tmp_path / "named"


def test_adapters_that_name_the_experts_of_a_mixture_differently_fold_together(fused_and_one_by_one):
    base, fused, named = fused_and_one_by_one
    total = {name: tensor.double() for name, tensor in tiny.load(base).state_dict().items()}
    before = {name: tensor.clone() for name, tensor in total.items()}
    for folder, weight in ((fused, 0.7), (named, -0.4)):
        merged = tiny.peft_model(base, folder).merge_and_unload().state_dict()
        for name, tensor in merged.items():
            total[name] += weight * (tensor.double() - before[name])
    theirs = tiny.load(base)
    theirs.load_state_dict({name: tensor.float() for name, tensor in total.items()})

    engine = started(loadout_of(base, fused=(fused, 0.7), named=(named, -0.4)))
    original = state(engine.detach())
    engine.attach()
    engine.fold()
    with torch.no_grad():
        assert_close(engine.logits(tiny.tokens()), theirs(tiny.tokens()).logits)
    engine.unfold()
    after = engine.detach().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in original.items())


def test_a_matrix_that_one_expert_adapts_and_another_brings_whole_folds_once(tmp_path):
    own = case("gpt2", "lora")
    model = tiny.load(own.base)
    for name, extra in (("low", {"target_modules": ["wpe"]}), ("whole", {"modules_to_save": ["wpe"]})):
        torch.manual_seed(len(name))
        config = peft.LoraConfig(**{"target_modules": ["c_attn"], "init_lora_weights": False, **extra})
        wrapped = peft.get_peft_model(tiny.load(own.base), config)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "modules_to_save" in key:
                    parameter.add_(torch.randn(parameter.shape))
        wrapped.save_pretrained(tmp_path / name)
    weight = model.transformer.wpe.weight.detach().clone()
    low = tiny.peft_model(own.base, tmp_path / "low").merge_and_unload().transformer.wpe.weight
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")["base_model.model.transformer.wpe.weight"]
    engine = started(loadout_of(own.base, low=(tmp_path / "low", 0.7), whole=(tmp_path / "whole", 0.5)))
    live = engine.logits(tiny.tokens())
    engine.fold()
    assert_close(engine.model.transformer.wpe.weight, weight + 0.7 * (low - weight) + 0.5 * (whole - weight))
    assert_close(engine.logits(tiny.tokens()), live)

"""Modules with the same input share one product, which does not outlive them."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch
from laws.cases import base

from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

LENGTH = 61
"""Of a prompt; no weight of the model has it among its sides."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One adapter on q and v, another on q, k, v and the inputs of the MLP."""
    import peft

    root = tmp_path_factory.mktemp("adapters")
    for name, targets in (("few", ["q_proj", "v_proj"]), ("many", ["q_proj", "k_proj", "v_proj", "gate_proj"])):
        torch.manual_seed(len(name))
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(tiny.load(base("llama")), config).save_pretrained(root / name)
    return root


def engine_of(folders, weights):
    experts = {name: {"adapter": str(folders / name), "weight": weight} for name, weight in weights.items()}
    return start(
        resolve(Recipe.model_validate({"base": str(base("llama")), "experts": experts}), "a test"), device="cpu"
    )


def held():
    """Tensors that have the prompt's length."""
    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and LENGTH in item.shape]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.5, 0.0), (0.0, 0.5)])
def test_a_forward_leaves_no_activations_behind_whichever_expert_is_muted(folders, weights):
    engine = engine_of(folders, dict(zip(("few", "many"), weights, strict=True)))
    engine.logits(torch.randint(3, 90, (1, LENGTH)))
    assert not held()


def test_modules_that_bring_inputs_of_their_own_leave_at_most_one_of_them_behind(folders):
    engine = engine_of(folders, {"few": 0.5, "many": 0.5})
    for name in list(engine.bank.modules):
        # As where an architecture shifts or scales the input of each projection on its own.
        engine.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: inputs[0] * 1.0)
    engine.logits(torch.randint(3, 90, (1, LENGTH)))
    assert len(held()) <= 2


def test_an_expert_that_is_muted_on_some_siblings_is_what_peft_computes(folders):
    engine = engine_of(folders, {"few": 1.0, "many": 0.0})
    with torch.no_grad():
        theirs = tiny.peft_model(base("llama"), folders / "few")(tiny.tokens()).logits
    torch.testing.assert_close(engine.logits(tiny.tokens()), theirs, rtol=1e-4, atol=1e-4)


def test_siblings_named_alike_may_have_inputs_of_different_width(folders, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, attention_hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        context_length=64, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    RwkvForCausalLM(config).save_pretrained(tmp_path / "rwkv")
    targets = ["key", "value", "receptance"]
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "rwkv")
    theirs = peft.get_peft_model(loaded, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(tiny.tokens()).logits
    experts = {"one": {"adapter": str(tmp_path / "adapter")}}
    recipe = Recipe.model_validate({"base": str(tmp_path / "rwkv"), "experts": experts})
    engine = start(resolve(recipe, "a test"), device="cpu")
    torch.testing.assert_close(engine.logits(tiny.tokens()), expected, rtol=1e-4, atol=1e-4)

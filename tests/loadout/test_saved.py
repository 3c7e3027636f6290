"""Copies of the base's own embedding and head, which PEFT saves beside an adapter, change nothing."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import tiny
import torch
from laws.cases import assert_close, base
from safetensors.torch import load_file, save_file

from lmoe_cli.adapter.soundness import inspect_adapter
from lmoe_cli.bake.adapter import bake_adapter
from lmoe_cli.bake.model import bake_model
from lmoe_cli.check import check
from lmoe_cli.engine.build import start
from lmoe_cli.findings import RefusedError
from lmoe_cli.loadout.base import read_base
from lmoe_cli.loadout.loadout import Expert, Loadout, resolve
from lmoe_cli.loadout.recipe import Recipe, Take
from lmoe_cli.source import Folder

WEIGHTS = {"one": 0.7, "two": -0.4}


def save(folder, arch, seed, *, with_copies, on=None, modules=(), **config):
    """A LoRA on the attention and some modules, with or without copies of embedding and head."""
    targets = [*tiny.attention(arch), *modules]
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny.load(on or base(arch)), settings)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
        wrapped.save_pretrained(folder, save_embedding_layers=with_copies)
    return folder


def train(folder, module):
    """Change what an adapter brings for a module, as training would."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"base_model.model.{module}.weight"
    assert name in tensors
    save_file(tensors | {name: tensors[name] + 0.05 * torch.randn(tensors[name].shape)}, path, {"format": "pt"})


def recipe(folder, *names, on):
    experts = {name: {"adapter": str(folder / name), "weight": WEIGHTS[name]} for name in names}
    return Recipe.model_validate({"base": str(on), "experts": experts})


def loadout(folder, *names, on):
    return resolve(recipe(folder, *names, on=on), "a test")


def codes(report):
    return {item.code for item in report.findings}


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_experts_saved_with_copies_of_the_base_blend_as_those_saved_without(tmp_path, arch):
    for seed, name in enumerate(WEIGHTS):
        save(tmp_path / "with" / name, arch, seed, with_copies=True)
        save(tmp_path / "without" / name, arch, seed, with_copies=False)
    with_copies = loadout(tmp_path / "with", *WEIGHTS, on=base(arch))
    assert len(with_copies.experts[0].adapter.stored) > len(load_file(
        tmp_path / "without" / "one" / "adapter_model.safetensors"))  # fmt: skip
    assert check(with_copies).ok
    without = loadout(tmp_path / "without", *WEIGHTS, on=base(arch))
    assert with_copies.by_target.keys() == without.by_target.keys()
    logits = [start(each, device="cpu", dtype="float32").logits(tiny.tokens()) for each in (with_copies, without)]
    assert torch.equal(*logits)


def test_a_copy_unties_nothing_in_a_bake_and_is_not_written_into_an_adapter(tmp_path):
    save(tmp_path / "one", "qwen3", 1, with_copies=True)
    own = loadout(tmp_path, "one", on=base("qwen3"))
    bake_model(own, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is True
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == load_file(
        base("qwen3") / "model.safetensors").keys()  # fmt: skip
    report = json.loads((tmp_path / "model" / "bake-report.json").read_text())["experts"]["one"]
    assert report["matched"] == report["tensors"], "every tensor of the adapter is accounted for"
    bake_adapter(own, tmp_path / "adapter")
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    live = start(own, device="cpu", dtype="float32").logits(tiny.tokens())
    with torch.no_grad():
        assert_close(tiny.load(tmp_path / "model")(tiny.tokens()).logits, live)
        assert_close(tiny.peft_model(base("qwen3"), tmp_path / "adapter")(tiny.tokens()).logits, live)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("arch", "end"), [("qwen3", "embed_tokens"), ("qwen3", "lm_head"), ("llama", "lm_head")])
def test_factors_on_a_matrix_that_is_not_the_base_s_stand_on_their_own_as_in_peft(tmp_path, arch, end, use_dora):
    """PEFT saves the matrix beneath them, and puts it in place of the base's: on a tied base at both ends."""
    save(tmp_path / "one", arch, 1, with_copies=True, modules=[end], use_dora=use_dora)
    path = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith(f"{end}.base_layer.weight")]
    save_file(tensors | {name: tensors[name] + 0.05 * torch.randn(tensors[name].shape)}, path, {"format": "pt"})
    own = loadout(tmp_path, "one", on=base(arch))
    assert check(own).ok
    engine = start(own, device="cpu", dtype="float32")
    engine.set_weights(one=1.0)
    with torch.no_grad():
        theirs = tiny.peft_model(base(arch), tmp_path / "one")(tiny.tokens()).logits
    assert_close(engine.logits(tiny.tokens()), theirs)
    assert not torch.allclose(theirs, tiny.load(base(arch))(tiny.tokens()).logits, atol=0.1)
    written = recipe(tmp_path, "one", on=base(arch)).model_dump()
    written["experts"]["one"]["weight"] = 1.0
    bake_model(resolve(Recipe.model_validate(written), "a test"), tmp_path / "model")
    with torch.no_grad():
        assert_close(tiny.load(tmp_path / "model")(tiny.tokens()).logits, theirs)


def test_two_experts_whose_factors_stand_on_other_matrices_than_a_tied_base_has_contradict_nothing(tmp_path):
    for seed, name in enumerate(WEIGHTS):
        save(tmp_path / name, "qwen3", seed, with_copies=True, modules=["embed_tokens"])
        path = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(path)
        (beneath,) = [key for key in tensors if key.endswith("base_layer.weight")]
        save_file(tensors | {beneath: tensors[beneath] + 0.01 * (seed + 1)}, path, {"format": "pt"})
    own = loadout(tmp_path, *WEIGHTS, on=base("qwen3"))
    assert check(own).ok
    bake_model(own, tmp_path / "model")
    with torch.no_grad():
        baked = tiny.load(tmp_path / "model")(tiny.tokens()).logits
    assert_close(start(own, device="cpu", dtype="float32").logits(tiny.tokens()), baked)


def test_a_copy_in_float16_of_a_base_in_float32_is_known(tmp_path):
    own = tmp_path / "base"
    tiny.model("llama").half().float().save_pretrained(own)  # as an F16 checkpoint that was stored again
    save(tmp_path / "one", "llama", 1, with_copies=True, on=own)
    path = tmp_path / "one" / "adapter_model.safetensors"
    halves = {name: t.half() if "lora_" not in name else t for name, t in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})
    assert all("self_attn" in target.module for target in loadout(tmp_path, "one", on=own).by_target)
    save_file({name: t + 0.25 if "lora_" not in name else t for name, t in halves.items()}, path, {"format": "pt"})
    assert not all("self_attn" in target.module for target in loadout(tmp_path, "one", on=own).by_target)


def test_a_whole_module_that_peft_wrote_twice_beside_the_base_s_own_is_one(tmp_path):
    """As it does for embeddings that it keeps whole, with ``save_embedding_layers``."""
    save(tmp_path / "one", "llama", 1, with_copies=True, modules_to_save=["embed_tokens"])
    path = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(path)
    written = [name for name in tensors if "embed_tokens" in name]
    assert len(written) == 3, written
    trained = tensors["base_model.model.model.embed_tokens.weight"] + 0.05
    again = "base_model.model.model.embed_tokens.modules_to_save.weight"
    assert again in written
    changed = {"base_model.model.model.embed_tokens.weight": trained, again: trained.clone()}
    save_file(tensors | changed, path, {"format": "pt"})
    own = loadout(tmp_path, "one", on=base("llama"))
    assert check(own).ok
    engine = start(own, device="cpu", dtype="float32")
    engine.set_weights(one=1.0)
    with torch.no_grad():
        theirs = tiny.peft_model(base("llama"), tmp_path / "one")(tiny.tokens()).logits
    assert_close(engine.logits(tiny.tokens()), theirs)
    report = bake_model(own, tmp_path / "model")["experts"]["one"]
    assert report["matched"] == report["tensors"] == len(tensors)
    third = again.replace(".weight", ".default.weight")
    for wrong in ({again: torch.zeros(2, 2)}, {third: trained.clone()}):
        save_file(tensors | wrong, path, {"format": "pt"})
        with pytest.raises(RefusedError) as caught:
            loadout(tmp_path, "one", on=base("llama"))
        assert [item.code for item in caught.value.findings] == ["tensor-unplaced"]


def test_a_trained_module_is_applied_though_its_config_does_not_list_it(tmp_path):
    save(tmp_path / "one", "llama", 1, with_copies=True)
    train(tmp_path / "one", "lm_head")
    own = loadout(tmp_path, "one", on=base("llama"))
    engine = start(own, device="cpu", dtype="float32")
    engine.set_weights(one=1.0)
    with torch.no_grad():
        assert_close(
            engine.logits(tiny.tokens()), tiny.peft_model(base("llama"), tmp_path / "one")(tiny.tokens()).logits
        )
    assert {target.module for target in own.by_target if "self_attn" not in target.module} == {"lm_head"}


def test_two_trained_modules_contradict_each_other_and_one_beside_a_copy_does_not(tmp_path):
    for seed, name in enumerate(WEIGHTS):
        save(tmp_path / name, "llama", seed, with_copies=False, modules_to_save=["lm_head"])
    train(tmp_path / "one", "lm_head")
    assert check(loadout(tmp_path, *WEIGHTS, on=base("llama"))).ok
    train(tmp_path / "two", "lm_head")
    assert "saved-conflict" in codes(check(loadout(tmp_path, *WEIGHTS, on=base("llama"))))


def test_taking_whole_modules_of_one_leaves_the_biases_of_another(tmp_path):
    """Which were trained beside its LoRA, with ``bias="all"``: only its own whole module stays out, and is told."""
    kinds = {"one": {"modules_to_save": ["lm_head"]}, "two": {"modules_to_save": ["lm_head"], "bias": "all"}}
    for seed, (name, words) in enumerate(kinds.items()):
        save(tmp_path / name, "llama", seed, with_copies=False, **words)
        train(tmp_path / name, "lm_head")
    tensors = load_file(tmp_path / "two" / "adapter_model.safetensors")
    biases = {name: tensor + 0.3 for name, tensor in tensors.items() if name.endswith("_proj.bias")}
    save_file(tensors | biases, tmp_path / "two" / "adapter_model.safetensors", {"format": "pt"})
    taking = recipe(tmp_path, *WEIGHTS, on=base("llama")).model_copy(update={"modules_to_save": Take(take="one")})
    own = resolve(taking, "a test")
    bake_model(own, tmp_path / "model")
    live = start(own, device="cpu", dtype="float32").logits(tiny.tokens())
    by_hand = tiny.load(base("llama"))
    before = {name: tensor.clone() for name, tensor in by_hand.state_dict().items()}
    for name, weight in WEIGHTS.items():
        merged = tiny.peft_model(base("llama"), tmp_path / name).merge_and_unload().state_dict()
        with torch.no_grad():
            for key, parameter in by_hand.named_parameters():
                if not (name == "two" and key == "lm_head.weight"):
                    parameter += weight * (merged[key] - before[key])
    with torch.no_grad():
        assert_close(live, by_hand(tiny.tokens()).logits)
        assert_close(tiny.load(tmp_path / "model")(tiny.tokens()).logits, live)
    told = json.loads((tmp_path / "model" / "bake-report.json").read_text())["experts"]
    assert told["one"]["left_out"] == []
    assert [name.rpartition("lm_head")[2] for name in told["two"]["left_out"]] == [".weight"]
    assert told["two"]["matched"] == told["two"]["tensors"] - 1


def test_a_copy_in_float32_of_a_base_in_bfloat16_is_known(tmp_path):
    own = tmp_path / "base"
    tiny.model("llama").to(torch.bfloat16).save_pretrained(own)
    save(tmp_path / "one", "llama", 1, with_copies=True, on=own)
    assert (
        load_file(tmp_path / "one" / "adapter_model.safetensors")["base_model.model.lm_head.weight"].dtype
        is torch.float32
    )
    assert all("self_attn" in target.module for target in loadout(tmp_path, "one", on=own).by_target)


class Far(Folder):
    """A folder that is not on this machine until it is fetched."""

    is_here = False

    def local(self, name):
        return super().local(name) if self.is_here else None

    def fetch(self, names, progress=None):
        self.is_here = True
        return super().fetch(names, progress)


def far(folder, on):
    written = recipe(folder, *WEIGHTS, on=on)
    experts = [
        Expert(name, inspect_adapter(Far(name, folder / name)), written.experts[name]) for name in written.experts
    ]
    return Loadout(written, "a test", read_base(Far("base", on)), tuple(experts))


def test_what_is_not_here_may_be_a_copy_and_is_settled_when_it_arrives(tmp_path):
    for seed, name in enumerate(WEIGHTS):
        save(tmp_path / name, "llama", seed, with_copies=True)
    own = far(tmp_path, base("llama"))
    report = check(own)
    assert report.ok
    assert "saved-unread" in codes(report)
    assert "lm_head" in {target.module for target in own.by_target}
    own.fetch()
    assert "lm_head" not in {target.module for target in own.by_target}

    for name in WEIGHTS:
        train(tmp_path / name, "lm_head")
    own = far(tmp_path, base("llama"))
    assert check(own).ok
    with pytest.raises(RefusedError) as caught:
        own.fetch()
    assert [(item.code, item.where) for item in caught.value.findings] == [("saved-conflict", "lm_head")]


def test_what_is_not_here_but_listed_by_its_config_is_believed(tmp_path):
    for seed, name in enumerate(WEIGHTS):
        save(tmp_path / name, "llama", seed, with_copies=False, modules_to_save=["lm_head"])
    assert "saved-conflict" in codes(check(far(tmp_path, base("llama"))))

"""Names that checkpoints, model classes and adapters do not share, and modules that a class does not call."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import tiny
import tiny_quantised
import torch
from laws.cases import assert_close, base
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lmoe_cli.bake.adapter import bake_adapter
from lmoe_cli.bake.model import bake_model
from lmoe_cli.bank.tree import compute_dtype
from lmoe_cli.check import check
from lmoe_cli.engine.build import start
from lmoe_cli.errors import InvalidFileError, UsageError
from lmoe_cli.findings import RefusedError
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def loadout(folder, weight=1.0, **adapters):
    experts = {name: {"adapter": str(path), "weight": weight} for name, path in adapters.items()}
    return resolve(Recipe.model_validate({"base": str(folder), "experts": experts}), "a test")


def trained(folder, out, seed=1, **config):
    """An adapter of PEFT with random numbers."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(tiny.load(folder), peft.LoraConfig(**LORA, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    wrapped.save_pretrained(out)
    return out


def renamed(adapter, out, old, new):
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, out / "adapter_model.safetensors")
    return out


def errors(own):
    return [item.code for item in check(own).findings if item.severity == "error"]


def is_computed(own, out):
    """Baked is what runs."""
    live = start(own, device="cpu", dtype="float32").logits(tiny.tokens())
    bake_model(own, out)
    with torch.no_grad():
        assert_close(tiny.load(out)(tiny.tokens()).logits, live)
    return live


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    """A base that ties its head to an embedding which it calls ``embeddings``."""
    torch.manual_seed(0)
    small = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **small, tie_word_embeddings=True))
    folder = tmp_path_factory.mktemp("mamba")
    model.save_pretrained(folder)
    return folder


def test_a_tied_embedding_by_another_name_leaves_the_head_as_it_was(mamba, tmp_path):
    adapter = trained(mamba, tmp_path / "one", target_modules=["x_proj", "embeddings"])
    live = is_computed(loadout(mamba, 0.5, one=adapter), tmp_path / "out")
    by_hand = peft.PeftModel.from_pretrained(tiny.load(mamba), adapter).eval()
    for module in by_hand.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] *= 0.5
    with torch.no_grad():
        assert_close(live, by_hand(tiny.tokens()).logits)


def test_an_expert_on_a_module_that_is_not_called_is_refused(mamba, tmp_path):
    adapter = trained(mamba, tmp_path / "one", target_modules=["x_proj", "dt_proj"])
    assert errors(loadout(mamba, one=adapter)) == ["module-uncalled"]


@pytest.mark.parametrize("dora", [False, True])
def test_a_head_has_two_names(dora, tmp_path):
    """GPT-NeoX stores ``embed_out``, and its class calls it ``lm_head``; older adapters and newer ones do, too."""
    folder = base("gpt_neox")
    new = trained(folder, tmp_path / "new", target_modules=["query_key_value", "lm_head"], use_dora=dora)
    old = renamed(new, tmp_path / "old", "lm_head", "embed_out")
    with torch.no_grad():
        due = tiny.peft_model(folder, new)(tiny.tokens()).logits
    for name, adapter in (("new", new), ("old", old)):
        assert_close(is_computed(loadout(folder, one=adapter), tmp_path / f"{name}-out"), due)
    half = loadout(folder, 0.5, one=new)
    live = is_computed(half, tmp_path / "half")
    bake_adapter(half, tmp_path / "adapter")
    with torch.no_grad():
        assert_close(tiny.peft_model(folder, tmp_path / "adapter")(tiny.tokens()).logits, live)


def test_a_tied_head_is_one_module_whatever_stands_in_front_of_its_name(tmp_path):
    folder = base("qwen3")
    new = trained(folder, tmp_path / "new", target_modules=["q_proj"], modules_to_save=["lm_head"])
    old = renamed(new, tmp_path / "old", "model.lm_head", "model.language_model.lm_head")
    with torch.no_grad():
        due = tiny.peft_model(folder, new)(tiny.tokens()).logits
    own = loadout(folder, one=old)
    assert_close(is_computed(own, tmp_path / "out"), due)
    bake_adapter(own, tmp_path / "adapter")
    with torch.no_grad():
        assert_close(tiny.peft_model(folder, tmp_path / "adapter")(tiny.tokens()).logits, due)
    assert errors(loadout(folder, one=new, two=old)) == ["saved-conflict"]


def test_dora_that_was_saved_by_half_is_refused_and_a_missing_module_is_told(tmp_path):
    whole = trained(
        base("llama"), tmp_path / "one", target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]
    )
    file = whole / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "lm_head" not in name}, file)
    told = {item.code: item for item in check(loadout(base("llama"), one=whole)).findings}
    assert "lm_head" in told["saved-missing"].message
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj.lora_mag" not in name}, file
    )
    with pytest.raises(RefusedError) as caught:
        loadout(base("llama"), one=whole)
    assert [item.code for item in caught.value.findings] == ["tensor-missing"]


def test_packed_weights_refuse_factors_of_another_size(tmp_path):
    """Headers of packed bases do not tell shapes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    narrow = tiny.save_base("llama", tmp_path / "narrow", hidden_size=16)
    adapter = trained(narrow, tmp_path / "one", target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    model = AutoModelForCausalLM.from_pretrained(
        base("llama"), quantization_config=tiny_quantised.settings("nf4"), device_map="cpu"
    )
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(InvalidFileError) as caught:
        start(loadout(tmp_path / "packed", one=adapter), device="cpu", dtype="float32")
    assert caught.value.code == "shape-mismatch"
    assert "q_proj" in caught.value.message


def test_weights_kept_in_eight_bits_are_not_computed_in():
    layer = torch.nn.Linear(4, 4, bias=False)
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert compute_dtype(layer, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("weight", [1e39, -1e39, float("inf"), float("nan")])
def test_a_weight_that_no_gate_can_be_is_refused_and_nothing_is_turned(weight):
    engine = start(loadout("demo:adventurer", mage="demo:mage"), device="cpu", dtype="float32")
    before = engine.logits(tiny.tokens())
    with pytest.raises(UsageError) as caught:
        engine.set_weights(mage=weight)
    assert caught.value.code == "weight-invalid"
    assert torch.equal(engine.logits(tiny.tokens()), before)

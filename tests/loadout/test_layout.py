"""Adapters and checkpoints call one matrix by several names; it is one target for all of them."""

from __future__ import annotations

import glob
import re
import shutil
import warnings

import peft
import pytest
import tiny
import torch
from laws.cases import assert_close, base
from safetensors.torch import load_file, save_file

from lmoe_cli.bake.model import bake_model
from lmoe_cli.check import check
from lmoe_cli.engine.build import start
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.layout import INTERLEAVED_EXPERTS, OTHER_LOOKUPS, TRANSPOSED_EXPERTS, UNBLENDED_EXPERTS
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

MIXTURES = {
    "granitemoe": {**tiny.MOE},
    "aria_text": {**tiny.MOE, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "llama4_text": {**tiny.MOE, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
                    "num_experts_per_tok": 1},
}  # fmt: skip
"""Mixtures whose fused experts are stored or called in a way of their own."""


@pytest.fixture(params=MIXTURES)
def arch(request, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, request.param, MIXTURES[request.param])
    return request.param


def save(on, folder, seed=1, **config):
    """An adapter made by PEFT, of random numbers."""
    settings = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **config)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny.load(on), settings)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
                elif parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
        wrapped.save_pretrained(folder)
    return folder


def loadout(on, weights, folder):
    experts = {name: {"adapter": str(folder / name), "weight": weight} for name, weight in weights.items()}
    return resolve(Recipe.model_validate({"base": str(on), "experts": experts}), "a test")


@pytest.fixture
def positions(tmp_path):
    """GPT-2 with a LoRA of its positions in one expert, and whole positions in the other."""
    save(base("gpt2"), tmp_path / "one", target_modules=["c_attn", "wpe"], fan_in_fan_out=True)
    save(base("gpt2"), tmp_path / "two", 2, target_modules=["c_attn"], modules_to_save=["wpe"], fan_in_fan_out=True)
    return loadout(base("gpt2"), {"one": 0.7, "two": 0.4}, tmp_path)


def test_a_lora_of_an_embedding_and_a_whole_one_are_parts_of_one_target(positions):
    (target,) = [target for target in positions.by_target if target.tensor == "transformer.wpe.weight"]
    assert [number for number, _ in positions.by_target[target]] == [0, 1]
    assert check(positions).ok


def test_they_blend_to_the_sum_of_what_peft_merges(positions, tmp_path):
    before = {name: tensor.double() for name, tensor in tiny.load(base("gpt2")).state_dict().items()}
    total = {name: tensor.clone() for name, tensor in before.items()}
    for expert in positions.experts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = tiny.peft_model(base("gpt2"), expert.adapter.source.path).merge_and_unload().state_dict()
        for name, tensor in merged.items():
            total[name] += expert.weight * (tensor.double() - before[name])
    theirs = tiny.load(base("gpt2"))
    theirs.load_state_dict({name: tensor.float() for name, tensor in total.items()})
    bake_model(positions, tmp_path / "out")
    engine = start(positions, device="cpu", dtype="float32")
    with torch.no_grad():
        expected = theirs(tiny.tokens()).logits
        assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, expected)
    assert_close(engine.logits(tiny.tokens(rows=1)), expected[:1])


def test_fused_experts_are_blended_as_peft_does_or_refused_by_name(arch, tmp_path):
    on = tiny.save_base(arch, tmp_path / "base")
    save(on, tmp_path / "one", target_modules=["q_proj"], target_parameters=[
        "experts.gate_up_proj", "experts.down_proj"])  # fmt: skip
    own = loadout(on, {"one": 1.0}, tmp_path)
    report = check(own)
    if arch in UNBLENDED_EXPERTS:
        errors = [item for item in report.findings if item.severity == "error"]
        assert [item.code for item in errors] == ["experts-unsupported"]
        assert arch in errors[0].message
        return
    assert report.ok
    with torch.no_grad():
        theirs = tiny.peft_model(on, tmp_path / "one")(tiny.tokens()).logits
        bake_model(own, tmp_path / "out")
        assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, theirs)
    assert_close(start(own, device="cpu", dtype="float32").logits(tiny.tokens()), theirs)


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("arch", ["qwen3_moe", "granitemoe"])
def test_experts_stacked_for_another_number_of_them_are_refused(monkeypatch, tmp_path, arch, count):
    """Otherwise those that are too many would be dropped, and what is pruned would change the wrong ones."""
    monkeypatch.setitem(tiny.ARCHITECTURES, "granitemoe", MIXTURES["granitemoe"])
    on = tiny.save_base(arch, tmp_path / "base")
    other = tiny.save_base(arch, tmp_path / "other", num_experts=count, num_local_experts=count)
    are_stacked = not any(".experts.0." in name for name in load_file(on / "model.safetensors"))
    assert are_stacked == (arch == "granitemoe"), "checkpoints of both kinds are tried"
    save(other, tmp_path / "one", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    errors = [item for item in check(loadout(on, {"one": 1.0}, tmp_path)).findings if item.severity == "error"]
    assert "shape-mismatch" in {item.code for item in errors}
    assert f"experts.down_proj of {count} experts on 4" in " ".join(item.message for item in errors)


def test_experts_that_are_layers_of_a_kind_of_their_own_are_refused(monkeypatch, tmp_path):
    words = {**tiny.MOE, "kv_channels": 8, "num_key_value_heads": 2}
    monkeypatch.setitem(tiny.ARCHITECTURES, "jetmoe", words)
    on = tiny.save_base("jetmoe", tmp_path / "base")
    save(on, tmp_path / "one", target_modules=[], target_parameters=["mlp.input_linear.weight"])
    errors = [item for item in check(loadout(on, {"one": 1.0}, tmp_path)).findings if item.severity == "error"]
    assert [item.code for item in errors] == ["experts-unsupported"]


def test_parameters_of_layers_that_are_kept_transposed_are_refused(tmp_path):
    """PEFT adds B A to the weight as it is stored there."""
    on = base("gpt2")
    save(on, tmp_path / "one", target_modules=[], target_parameters=["attn.c_proj.weight"])
    errors = [item for item in check(loadout(on, {"one": 1.0}, tmp_path)).findings if item.severity == "error"]
    assert [item.code for item in errors] == ["module-unsupported"]
    assert "changes parameters that gpt2 keeps transposed" in errors[0].message


@pytest.mark.parametrize("words", [{"modules_to_save": ["embed_positions"]}, {}])
def test_positions_that_are_more_than_a_lookup_are_refused_and_nothing_else_runs_them(tmp_path, words, monkeypatch):
    targets = ["q_proj"] if words else ["q_proj", "embed_positions"]
    save(base("opt"), tmp_path / "one", target_modules=targets, **words)
    own = loadout(base("opt"), {"one": 1.0}, tmp_path)
    errors = [item for item in check(own).findings if item.severity == "error"]
    assert [item.code for item in errors] == ["module-unsupported"]
    assert "model.decoder.embed_positions" in errors[0].message
    with pytest.raises(UsageError) as caught:  # also where nobody knew it before
        start(own, device="cpu", dtype="float32")
    assert caught.value.code == "module-unsupported"


def test_a_copy_of_an_embedding_that_is_more_than_a_lookup_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(OTHER_LOOKUPS, "llama", ("embed_tokens",))
    save(base("llama"), tmp_path / "one", target_modules=["q_proj"])
    path = tmp_path / "one" / "adapter_model.safetensors"
    copy = load_file(base("llama") / "model.safetensors")["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.weight"
    save_file(load_file(path) | {name: copy}, path)
    assert check(loadout(base("llama"), {"one": 1.0}, tmp_path)).ok
    save_file(load_file(path) | {name: copy + 1}, path)
    assert not check(loadout(base("llama"), {"one": 1.0}, tmp_path)).ok


def test_a_bias_that_a_class_has_no_place_for_is_refused(tmp_path):
    """A router of a mixture was a linear layer in older versions, which PEFT could give a bias."""
    tiny.save_adapter(base("qwen3_moe"), "gate", tmp_path / "one")
    path = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("gate.lora_B.weight"))
    save_file(tensors | {name.replace(".weight", ".bias"): torch.ones(4)}, path)
    with pytest.raises(UsageError) as caught:
        start(loadout(base("qwen3_moe"), {"one": 1.0}, tmp_path), device="cpu", dtype="float32")
    assert caught.value.code == "module-unsupported"
    assert "has no bias" in str(caught.value)


def test_every_embedding_of_a_causal_model_that_is_more_than_a_lookup_is_known():
    import transformers.models as models
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = model_type_to_module_name(name)
        for path in glob.glob(f"{models.__path__[0]}/{module}/modeling_{module}.py"):
            with open(path) as file:
                source = file.read()
            for own in re.findall(r"class (\w+)\(nn\.Embedding\)", source):
                if not own.endswith("ScaledWordEmbedding"):
                    found[name] = tuple(re.findall(rf"self\.(\w+) = {own}\(", source))[:1]
    assert len(found) > 10
    assert {name: OTHER_LOOKUPS.get(name) for name in found} == found


def test_fused_experts_may_be_named_as_older_versions_do(monkeypatch, tmp_path):
    monkeypatch.setitem(tiny.ARCHITECTURES, "granitemoe", MIXTURES["granitemoe"])
    on = tiny.save_base("granitemoe", tmp_path / "base")
    save(on, tmp_path / "new", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    for name, before, after in (
        ("adapter_model.safetensors", "block_sparse_moe.experts", "block_sparse_moe.output_linear"),
        ("adapter_config.json", "experts.down_proj", "output_linear.weight"),
    ):
        path = tmp_path / "old" / name
        if name.endswith("json"):
            path.write_text(path.read_text().replace(before, after))
        else:
            save_file({key.replace(before, after): tensor for key, tensor in load_file(path).items()}, path)
    old, new = (start(loadout(on, {name: 1.0}, tmp_path), device="cpu", dtype="float32") for name in ("old", "new"))
    assert torch.equal(old.logits(tiny.tokens()), new.logits(tiny.tokens()))


def test_transformers_runs_fused_experts_as_the_layout_believes():
    import transformers.models as models
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ways = {"transposed": set(), "interleaved": set(), "their own": set()}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = model_type_to_module_name(name)
        for file in glob.glob(f"{models.__path__[0]}/{folder}/modeling_{folder}.py"):
            with open(file) as opened:
                source = opened.read()
            classes = r"((?:^@.*\n)*)^class \w*TextExperts\(|((?:^@.*\n)*)^class \w*Experts\("
            for found in re.finditer(classes, source, re.MULTILINE):
                decorator = found[1] or found[2] or ""
                body = re.split(r"^class |^@", source[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]
                if "self.gate_up_proj = nn.Parameter" not in body:
                    continue
                if "use_experts_implementation" not in decorator:
                    ways["their own"].add(name)
                if "is_transposed=True" in decorator:
                    ways["transposed"].add(name)
                if "is_concatenated=False" in decorator:
                    ways["interleaved"].add(name)
    assert ways["their own"] == set(UNBLENDED_EXPERTS)
    assert ways["transposed"] == set(TRANSPOSED_EXPERTS)
    assert ways["interleaved"] == set(INTERLEAVED_EXPERTS)

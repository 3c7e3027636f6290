"""A check finds what does not fit, before a weight is read."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from laws.cases import base, case
from safetensors.torch import load_file, save_file

from lmoe_cli.check import check, require
from lmoe_cli.findings import RefusedError
from lmoe_cli.loadout.identity import Match, at_revision, canonical, compare, same
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe


@pytest.fixture
def parts(tmp_path):
    """A base and two adapters of one's own, to be damaged."""
    own = case("llama", "lora")
    for name, folder in (("base", own.base), ("one", own.one), ("two", own.two)):
        shutil.copytree(folder, tmp_path / name)
    for name in ("one", "two"):
        edit(tmp_path / name / "adapter_config.json", base_model_name_or_path="org/base")
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder, function):
    path = folder / "adapter_model.safetensors"
    save_file(function(load_file(path)), path, metadata={"format": "pt"})


def found(parts, *, one=None, two=None, **recipe):
    experts = {
        "one": {"adapter": str(parts / "one"), **(one or {})},
        "two": {"adapter": str(parts / "two"), **(two or {})},
    }
    loadout = resolve(Recipe.model_validate({"base": str(parts / "base"), "experts": experts, **recipe}), "a test")
    return check(loadout)


def codes(report):
    return {item.code for item in report.findings}


def test_parts_that_fit_have_no_errors(parts):
    report = found(parts)
    assert report.ok
    (pair,) = report.pairs
    assert (pair.first, pair.second, pair.shared, pair.overlap) == ("one", "two", 14, 1.0)
    assert pair.same_base
    assert not pair.same_rank
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in
             load_file(parts / "base" / "model.safetensors").items()}  # fmt: skip
    assert report.memory["base"] == sum(sizes.values())
    assert report.memory["cache_per_token"] == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes


def test_experts_that_name_one_module_differently_share_it(parts):
    def renamed(tensors):
        return {name.replace("base_model.model.model.", "base_model.model."): t for name, t in tensors.items()}

    before = found(parts).pairs
    change(parts / "two", renamed)
    report = found(parts)
    assert report.ok
    assert report.pairs == before
    assert report.pairs[0].shared == 14


def test_a_module_that_the_base_lacks_is_an_error(parts):
    change(parts / "one", lambda tensors: {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()})
    report = found(parts)
    assert "module-missing" in codes(report)
    (error,) = [item for item in report.findings if item.code == "module-missing"]
    assert "7 of 14 modules" in error.message
    assert "model.layers.7.mlp.down_proj" in error.message


def test_a_shape_that_does_not_fit_is_an_error(parts):
    def wider(tensors):
        name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
        return tensors | {name: torch.zeros(4, 40)}

    change(parts / "one", wider)
    assert "shape-mismatch" in codes(found(parts))


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_a_vocabulary_that_was_resized_is_refused_by_name(parts, module):
    name = f"base_model.model.{module}.weight"
    change(parts / "one", lambda tensors: tensors | {name: torch.zeros(tiny.VOCAB + 1, 32)})
    assert "vocabulary-resized" in codes(found(parts))


def test_an_adapter_of_another_base_of_equal_shape_is_an_error_unless_it_is_accepted_by_name(parts):
    edit(parts / "base" / "config.json", _name_or_path="org/base")
    edit(parts / "one" / "adapter_config.json", base_model_name_or_path="org/other")
    report = found(parts)
    assert "base-mismatch" in codes(report)
    with pytest.raises(RefusedError) as caught:
        require(resolve(Recipe.model_validate({"base": str(parts / "base"),
                "experts": {"one": {"adapter": str(parts / "one")}}}), "a test"))  # fmt: skip
    assert caught.value.exit_code == 1
    accepted = found(parts, one={"accept_base": ["org/other"]})
    assert accepted.ok
    assert "base-accepted" in codes(accepted)
    assert not found(parts, one={"accept_base": ["org/third"]}).ok


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("named", "of_base", "verdict"),
    [
        (None, "org/base", Match.SAME),
        ("main", "org/base", Match.SAME),
        ("main", "org/base@step1000", Match.SAME),
        ("unsloth", "org/base", Match.SAME),  # which Unsloth once wrote of itself
        ("step1000", "org/base@step1000", Match.SAME),
        (COMMIT[:7], "org/base", Match.SAME),
        (COMMIT, "org/base@step1000", Match.SAME),
        ("step1000", "org/base", Match.OTHER),
        ("step1000", "org/base@step2000", Match.OTHER),
        ("step1000", f"hf://org/base@{COMMIT}", Match.UNKNOWN),  # as training pins what it reads
        (COMMIT[::-1], "org/base", Match.UNKNOWN),  # another commit may be one of the readme alone
    ],
)
def test_the_revision_of_its_base_that_an_adapter_names_is_compared(named, of_base, verdict):
    source = SimpleNamespace(revision=COMMIT, repository_name="org/base")
    base = SimpleNamespace(source=source, ref=of_base)
    assert at_revision("Org/Base", named, base) is verdict
    assert at_revision("mirror/base", named, base) is Match.SAME  # commits of other repositories say nothing
    source.repository_name = None
    assert at_revision("org/base", named, base) is Match.SAME


def test_an_adapter_of_another_revision_of_its_base_is_an_error_unless_that_is_accepted(parts, monkeypatch):
    edit(parts / "base" / "config.json", _name_or_path="org/base")
    edit(parts / "one" / "adapter_config.json", revision="step1000")
    assert not [item for item in found(parts).findings if item.where == "one"]
    of_hub = SimpleNamespace(source=SimpleNamespace(revision=COMMIT, repository_name="org/base"), ref="org/base")
    monkeypatch.setattr("lmoe_cli.check.at_revision", lambda claim, revision, _: at_revision(claim, revision, of_hub))
    (error,) = [item for item in found(parts).findings if item.code == "base-mismatch"]
    assert "trained on org/base@step1000" in error.message
    assert error.hint.endswith("accept_base: [org/base@step1000]")
    assert not found(parts, one={"accept_base": ["org/base"]}).ok
    assert not found(parts, one={"accept_base": ["org/base@step2"]}).ok
    assert found(parts, one={"accept_base": ["org/base@step1000"]}).ok
    edit(parts / "one" / "adapter_config.json", revision=COMMIT[::-1])
    report = found(parts)
    assert report.ok
    assert [item.where for item in report.findings if item.code == "base-unconfirmed"] == ["one"]


def test_a_base_known_only_by_a_folder_is_a_warning(parts):
    edit(parts / "one" / "adapter_config.json", base_model_name_or_path="/data/somewhere/checkpoint-7")
    report = found(parts)
    assert report.ok
    assert "base-unconfirmed" in codes(report)


def test_weights_that_are_no_floats_are_an_error_where_experts_change_them(parts):
    path = parts / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
    assert "base-dtype-unsupported" in {item.code for item in found(parts).findings if item.severity == "error"}


def test_the_verdict_does_not_depend_on_the_working_directory(parts, monkeypatch):
    edit(parts / "one" / "adapter_config.json", base_model_name_or_path="demo:adventurer")
    experts = {"one": {"adapter": "./one"}}
    seen = set()
    for folder, where in ((parts, "./base"), (parts.parent, f"{parts.name}/base"), (parts, str(parts / "base"))):
        monkeypatch.chdir(folder)
        adapter = experts if folder == parts else {"one": {"adapter": f"{parts.name}/one"}}
        report = check(resolve(Recipe.model_validate({"base": where, "experts": adapter}), "a test"))
        seen.add(tuple(item.code for item in report.findings))
    assert len(seen) == 1


@pytest.mark.parametrize("known_as", ["twin", "base"])
def test_the_weights_decide_where_the_named_base_is_a_folder_on_this_machine(parts, known_as):
    trained_on = parts / "elsewhere" / known_as
    shutil.copytree(parts / "base", trained_on)
    edit(parts / "one" / "adapter_config.json", base_model_name_or_path=str(trained_on))
    assert not [item for item in found(parts).findings if item.where == "one"]

    weights = load_file(trained_on / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, trained_on / "model.safetensors")
    report = found(parts)
    assert [item.where for item in report.findings if item.code == "base-mismatch"] == ["one"]
    assert found(parts, one={"accept_base": [str(trained_on)]}).ok


@pytest.mark.parametrize(
    ("claim", "name", "verdict"),
    [
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B", Match.SAME),
        ("qwen/qwen3-4b", "Qwen/Qwen3-4B", Match.SAME),
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "Qwen/Qwen3-4B", Match.SAME),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct", Match.SAME),
        ("unsloth/mistral-7b-bnb-4bit", "mistralai/Mistral-7B-v0.1", Match.SAME),
        ("unsloth/tinyllama-bnb-4bit", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", Match.SAME),
        ("unsloth/tinyllama-chat-bnb-4bit", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", Match.SAME),
        ("yahma/llama-7b-hf", "huggyllama/llama-7b", Match.SAME),
        ("yahma/llama-13b-hf", "huggyllama/llama-7b", Match.OTHER),
        ("gpt2", "openai-community/gpt2", Match.SAME),
        ("/models/Qwen3-4B/", "Qwen/Qwen3-4B", Match.SAME),
        ("C:\\models\\Qwen3-4B", "Qwen/Qwen3-4B", Match.SAME),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/abc", "Qwen/Qwen3-4B", Match.SAME),
        ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B", Match.OTHER),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B", Match.OTHER),
        ("someone/Qwen3-4B", "Qwen/Qwen3-4B", Match.OTHER),
        ("gpt2-medium", "openai-community/gpt2", Match.OTHER),
        ("./checkpoints/final", "Qwen/Qwen3-4B", Match.UNKNOWN),
        (None, "Qwen/Qwen3-4B", Match.UNKNOWN),
        ("", "Qwen/Qwen3-4B", Match.UNKNOWN),
    ],
)
def test_names_of_bases_are_compared_after_mirrors_quantised_copies_and_renamings(parts, claim, name, verdict):
    from lmoe_cli.loadout.base import read_base
    from lmoe_cli.source import open_source

    edit(parts / "base" / "config.json", _name_or_path=name)
    assert compare(claim, read_base(open_source(str(parts / "base")))) is verdict


def test_a_quantised_training_base_is_told(parts):
    edit(parts / "base" / "config.json", _name_or_path="org/base")
    edit(parts / "one" / "adapter_config.json", base_model_name_or_path="unsloth/base-bnb-4bit")
    assert "base-was-quantized" in codes(found(parts))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialiser_that_changed_the_base_is_an_error(parts, init):
    edit(parts / "one" / "adapter_config.json", init_lora_weights=init)
    assert "init-changes-base" in codes(found(parts))
    assert not found(parts).ok


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisers_fit(parts, init):
    edit(parts / "one" / "adapter_config.json", init_lora_weights=init)
    assert found(parts).ok


@pytest.mark.parametrize(
    "setting",
    [{"layer_replication": [[0, 1]]}, {"alora_invocation_tokens": [1]}, {"use_qalora": True},
     {"trainable_token_indices": [3]}, {"enable_lora": [True, False, True]}],
)  # fmt: skip
def test_settings_that_no_fixed_delta_can_express_are_errors(parts, setting):
    edit(parts / "one" / "adapter_config.json", **setting)
    assert "setting-unsupported" in codes(found(parts))


def test_two_experts_that_bring_the_same_module_need_a_policy(parts):
    saved = {"base_model.model.lm_head.weight": torch.randn(tiny.VOCAB, 32)}
    for name in ("one", "two"):
        change(parts / name, lambda tensors: tensors | saved)
    assert "saved-conflict" in codes(found(parts))
    assert found(parts, modules_to_save="blend").ok
    assert found(parts, modules_to_save={"take": "one"}).ok


def test_a_rule_that_matches_nothing_is_an_error_and_modules_without_a_rule_are_told(parts):
    report = found(parts, one={"weight": [{"match": "mpl", "value": 0.5}]})
    assert {"weight-unmatched", "weight-default"} <= codes(report)
    assert not report.ok
    whole = found(parts, one={"weight": [{"match": "mlp", "value": 0.5}, {"match": "*", "value": 0.1}]})
    assert whole.ok
    assert "weight-default" not in codes(whole)


def test_extreme_scalings_and_ranks_are_warnings(parts):
    edit(parts / "one" / "adapter_config.json", lora_alpha=4000)
    report = found(parts)
    assert "scaling-extreme" in codes(report)
    assert report.ok


def test_code_of_the_base_is_never_run_unasked(parts):
    edit(parts / "base" / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "remote-code" in codes(found(parts))
    assert not found(parts).ok


def test_a_loadout_that_needs_more_memory_than_there_is_is_a_warning(parts, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert "memory-short" in codes(found(parts))


def test_everything_that_cannot_be_read_is_told_at_once(parts):
    shutil.rmtree(parts / "one")
    (parts / "two" / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(RefusedError) as caught:
        found(parts)
    assert {item.code for item in caught.value.findings} == {"not-found", "header-truncated"}
    assert [item.where for item in caught.value.findings] == ["one", "two"]


def test_a_base_without_prefix_in_its_names_is_the_same_base(tmp_path):
    """GPT-2's own checkpoint calls its layers ``h.0``, adapters call them ``transformer.h.0``."""
    own = case("gpt2", "lora")
    shutil.copytree(own.base, tmp_path / "bare")
    path = tmp_path / "bare" / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path)
    recipe = {"base": str(tmp_path / "bare"), "experts": {"one": {"adapter": str(own.one)}}}
    loadout = resolve(Recipe.model_validate(recipe), "a test")
    assert check(loadout).ok
    assert len(loadout.by_target) == len(case("gpt2", "lora").loadout({"one": 1.0}).by_target)


def test_conv1d_is_known_for_every_causal_model_of_transformers_that_uses_it():
    import inspect
    import re

    import transformers.models as models
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from lmoe_cli.loadout.layout import CONV1D

    using = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = models.__path__[0] + "/" + {"openai-gpt": "openai"}.get(name, name.replace("-", "_"))
        try:
            with open(f"{folder}/modeling_{folder.rpartition('/')[2]}.py") as file:
                source = file.read()
        except FileNotFoundError:
            continue
        if re.search(r"= Conv1D\(", source):
            using.add(name)
            leaves = set(re.findall(r"self\.(\w+) = Conv1D\(", source))
            assert leaves <= set(CONV1D[name]), name
    assert using == set(CONV1D)
    assert inspect.ismodule(models)


def test_canonical_names_are_stable_under_repetition():
    for name in ("Qwen/Qwen3-4B", "unsloth/mistral-7b-bnb-4bit", "gpt2", "/a/b/c", "demo:mage", "hf://org/x@main"):
        assert canonical(canonical(name)) == canonical(name)
    assert same("org/x", "x")
    assert not same("org/x", "other/x")
    assert base("llama").is_dir()

"""A bake is whole, repeatable, told in its report, and refuses what it cannot do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from laws.cases import MIXED, Case, case
from safetensors.torch import load_file, save_file

from lmoe_cli import files
from lmoe_cli.bake import blocks, rows, unit
from lmoe_cli.bake.adapter import bake_adapter
from lmoe_cli.bake.model import bake_model
from lmoe_cli.bake.verify import verify, verify_adapter
from lmoe_cli.errors import LmoeError, ResourceError, UsageError
from lmoe_cli.loadout.recipe import BakeSettings


@pytest.fixture(scope="module")
def loadout():
    return case("qwen3", "lora").loadout(MIXED)


def with_method(loadout, **settings):
    from dataclasses import replace

    return replace(loadout, recipe=loadout.recipe.model_copy(update={"bake": BakeSettings(**settings)}))


def test_shards_hold_the_same_tensors_as_one_file_and_transformers_reads_them(loadout, tmp_path):
    bake_model(loadout, tmp_path / "one")
    bake_model(loadout, tmp_path / "many", shard_size=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = {file for file in os.listdir(tmp_path / "many") if file.startswith("model-")}
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == shards
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {name: load_file(tmp_path / "many" / file)[name] for name, file in index["weight_map"].items()}
    assert one.keys() == many.keys()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in one.values())
    with torch.no_grad():
        ids = tiny.tokens()
        assert torch.equal(tiny.load(tmp_path / "one")(ids).logits, tiny.load(tmp_path / "many")(ids).logits)


def test_the_bytes_do_not_depend_on_how_many_files_are_written_at_a_time(loadout, tmp_path):
    for name, settings in (("linear", {}), ("random", {"method": "dare_ties", "seed": 3})):
        own = with_method(loadout, **settings)
        hashes = []
        for jobs in (1, 3):
            report = bake_model(own, tmp_path / f"{name}{jobs}", shard_size=20_000, jobs=jobs)
            hashes.append(report["files"])
        assert hashes[0] == hashes[1]


def test_a_weight_is_rounded_once_from_the_exact_sum(loadout, tmp_path):
    bake_model(loadout, tmp_path / "exact", dtype="float32")
    bake_model(loadout, tmp_path / "half", dtype="bfloat16")
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(tensor.bfloat16(), half[name]) for name, tensor in exact.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def in_bfloat16(tmp_path):
    """A loadout whose base is stored in bfloat16, large enough for several blocks."""
    base = tiny.save_base("qwen3", tmp_path / "base", hidden_size=256, intermediate_size=1536, vocab_size=512)
    state = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    one = tiny.save_adapter(base, "lora", tmp_path / "one")
    return Case(base, one, tiny.save_adapter(base, "lora", tmp_path / "two", seed=9, rank=3)).loadout(MIXED)


@pytest.mark.parametrize("split", [True, False])
def test_the_matrix_unit_rounds_as_float32_but_for_as_many_elements_as_the_report_tells(tmp_path, monkeypatch, split):
    loadout = in_bfloat16(tmp_path)
    monkeypatch.setattr(rows, "SAMPLED", 1)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 9000)
    if not split:  # as if the factors went into the unit as they are, in one half each
        monkeypatch.setattr(unit, "_halves", lambda factor: (factor.bfloat16(), torch.zeros_like(factor).bfloat16()))
    bake_model(loadout, tmp_path / "exact", rounding="exact")
    report = bake_model(loadout, tmp_path / "fused", rounding="fused")
    exact, fused = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "fused"))
    changed = {tensor["name"] for tensor in report["tensors"]}
    total = sum(exact[name].numel() for name in changed)
    differing = sum(int((exact[name] != fused[name]).sum()) for name in changed)
    assert report["rounding"] == {"way": "fused", "compared": total, "differing": pytest.approx(differing / total)}
    assert (differing / total < 0.01) == split
    again = json.loads((tmp_path / "exact" / "bake-report.json").read_text())
    assert again["rounding"] == {"way": "exact"}
    for before, after in zip(again["tensors"], report["tensors"], strict=True):
        assert after["change"] == pytest.approx(before["change"], rel=1e-3)
        assert (after["rounding"] == pytest.approx(before["rounding"], rel=1e-3)) == split


def test_what_rounding_takes_is_told_as_it_is(tmp_path):
    loadout = in_bfloat16(tmp_path)
    bake_model(loadout, tmp_path / "exact", dtype="float32")
    report = bake_model(loadout, tmp_path / "half")
    exact, half = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "half"))
    for tensor in report["tensors"]:
        plain, rounded = exact[tensor["name"]].double(), half[tensor["name"]].double()
        assert tensor["rounding"] == pytest.approx(float((plain - rounded).norm() / plain.norm()), rel=0.1)


def test_the_report_tells_recipe_hashes_and_what_became_of_every_tensor(loadout, tmp_path):
    bake_model(loadout, tmp_path / "baked")
    report = json.loads((tmp_path / "baked" / "bake-report.json").read_text())
    file = tmp_path / "baked" / "model.safetensors"
    assert report["files"] == {"model.safetensors": hashlib.sha256(file.read_bytes()).hexdigest()}
    own = case("qwen3", "lora")
    for told, folder, names in (
        (report["experts"]["one"], own.one, ("adapter_model.safetensors", "adapter_config.json")),
        (report["base"], own.base, ("model.safetensors", "config.json")),
    ):
        assert told["sha256"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    assert report["weights"] == MIXED
    before, after = load_file(case("qwen3", "lora").base / "model.safetensors"), load_file(file)
    for tensor in report["tensors"]:
        plain, new = before[tensor["name"]].double(), after[tensor["name"]].double()
        assert tensor["change"] == pytest.approx(float((new - plain).norm() / plain.norm()), rel=1e-3)
        assert tensor["experts"] == ["one", "two"]
    assert report["changed"] + report["copied"] == len(after)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_nothing_is_left_when_the_disk_is_full_half_way(loadout, tmp_path, monkeypatch, kind):
    real, calls = os.write, []

    def full(descriptor, data):
        calls.append(len(data))
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(files.os, "write", full)
    bake = bake_model if kind == "model" else bake_adapter
    with pytest.raises(ResourceError, match="full"):
        bake(loadout, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_where_there_is_no_room(loadout, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 2000, "free": 1000})())
    with pytest.raises(ResourceError, match="free"):
        bake_model(loadout, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_bake_leaves_what_stood_there(loadout, tmp_path, fault):
    bake_model(loadout, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def stop(size):
        raise fault

    with pytest.raises(fault):
        bake_model(loadout, tmp_path / "out", force=True, advance=stop)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_a_model_but_no_other_folder(loadout, tmp_path):
    bake_model(loadout, tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        bake_model(loadout, tmp_path / "out")
    bake_model(loadout, tmp_path / "out", force=True)
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("keep me")
    with pytest.raises(UsageError, match="not a folder that lmoe wrote"):
        bake_model(loadout, precious, force=True)
    assert (precious / "letter.txt").read_text() == "keep me"


def test_force_does_not_replace_somebody_elses_project(loadout, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not a folder that lmoe wrote"):
        bake_model(loadout, tmp_path, force=True)


@pytest.mark.parametrize("bake", [bake_model, bake_adapter])
@pytest.mark.parametrize("place", ["base", "one", "."])
def test_what_a_loadout_is_made_of_is_never_written_over(tmp_path, bake, place):
    own = case("qwen3", "lora")
    for name, folder in (("base", own.base), ("one", own.one)):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "bake-report.json").write_text("{}")  # even if it was once baked
    loadout = Case(tmp_path / "base", tmp_path / "one", own.two).loadout(MIXED)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError) as caught:
        bake(loadout, tmp_path / place, force=True)
    assert caught.value.code == "output-is-input"
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_base_with_nan_is_not_baked_whether_experts_change_it_there_or_not(tmp_path, name):
    from safetensors.torch import save_file

    own = case("qwen3", "lora")
    shutil.copytree(own.base, tmp_path / "base")
    tensors = load_file(own.base / "model.safetensors")
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    loadout = Case(tmp_path / "base", own.one, own.two).loadout(MIXED)
    with pytest.raises(LmoeError, match=f"the base's {name} holds NaN"):
        bake_model(loadout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_whose_product_is_infinite_are_not_cut_to_a_rank(tmp_path):
    from safetensors.torch import save_file

    own = case("qwen3", "lora")
    shutil.copytree(own.one, tmp_path / "one")
    tensors = load_file(own.one / "adapter_model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[0] = 3e38
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LmoeError, match="too large"):
        bake_adapter(Case(own.base, tmp_path / "one", own.two).loadout(MIXED), tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_weight_too_large_for_the_dtype_is_an_error_and_not_infinity(tmp_path):
    own = case("llama", "lora").loadout({"one": 99.0})
    big = tmp_path / "big"
    model = tiny.load(own.base.source.path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(65_503.0)
    model.save_pretrained(big)
    loud = Case(big, case("llama", "lora").one, case("llama", "lora").two).loadout({"one": 99.0})
    with pytest.raises(LmoeError, match="float16"):
        bake_model(loud, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_verification_accepts_one_rounding(loadout, tmp_path, dtype):
    bake_model(loadout, tmp_path / "out", dtype=dtype)
    verdict = verify(loadout, tmp_path / "out")
    assert verdict.ok
    assert verdict.difference < 0.1 * verdict.effect


@pytest.mark.parametrize(
    "fault", ["an expert dropped", "a weight a little off", "a matrix transposed", "rounded twice", "ties not cut"]
)
def test_verification_refuses_what_is_more_than_one_rounding(loadout, tmp_path, fault):
    baked, wrong = loadout, loadout
    dtype = "bfloat16"
    if fault == "an expert dropped":
        wrong = case("qwen3", "lora").loadout({"one": MIXED["one"]})
    elif fault == "a weight a little off":
        wrong = case("qwen3", "lora").loadout({"one": MIXED["one"], "two": MIXED["two"] * 1.1})
    elif fault == "ties not cut":
        baked = wrong = case("qwen3", "embedding").loadout(MIXED)
        dtype = "float32"
    bake_model(wrong, tmp_path / "out", dtype=dtype)
    weights = tmp_path / "out" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.self_attn.q_proj.weight"
    if fault == "a matrix transposed":
        tensors[name] = tensors[name].T.contiguous()
    elif fault == "rounded twice":
        coarse = {key: tensor.to(torch.float8_e4m3fn).to(tensor.dtype) for key, tensor in tensors.items()}
        tensors = coarse
    elif fault == "ties not cut":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    from safetensors.torch import save_file

    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(LmoeError, match="from the live blend"):
        verify(baked, tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "variant"), [("float32", "lora"), ("float32", "dora"), ("bfloat16", "rslora"), ("bfloat16", "dora")]
)
def test_an_adapter_is_verified_as_peft_runs_it(tmp_path, variant, dtype):
    loadout = case("qwen3", variant).loadout(MIXED)
    report = bake_adapter(
        loadout, tmp_path / "out", dtype=dtype, verify=lambda folder: verify_adapter(loadout, folder).as_dict()
    )
    assert report["verify"]["difference"] < 0.1 * report["verify"]["effect"]
    wrong = case("qwen3", variant).loadout({"one": MIXED["one"], "two": MIXED["two"] * 1.2})
    with pytest.raises(LmoeError, match="from the live blend"):
        bake_adapter(wrong, tmp_path / "wrong", dtype=dtype, verify=lambda folder: verify_adapter(loadout, folder))
    assert not (tmp_path / "wrong").exists()


def test_verification_sees_a_mistake_that_folding_and_baking_share(loadout, tmp_path, monkeypatch):
    """Both use the same update of a matrix; here it forgets the second expert."""
    from lmoe_cli.bake import write
    from lmoe_cli.bank import delta
    from lmoe_cli.engine import fold

    def forgetful(terms, **settings):
        return delta.update(list(terms)[:1], **settings)

    monkeypatch.setattr(write, "update", forgetful)
    monkeypatch.setattr(fold, "update", forgetful)
    bake_model(loadout, tmp_path / "out")
    with pytest.raises(LmoeError, match="from the live blend"):
        verify(loadout, tmp_path / "out")


def test_a_base_whose_one_file_is_named_as_a_shard_is_baked_into_one_that_loads(tmp_path):
    own = case("qwen3", "lora")
    base = tmp_path / "base"
    shutil.copytree(own.base, base)
    shard = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(base / shard), shard)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    bake_model(Case(base, own.one, own.two).loadout(MIXED), tmp_path / "out")
    assert tiny.load(tmp_path / "out")(tiny.tokens()).logits.isfinite().all()


@pytest.mark.parametrize("weight", [0.0005, 0.001])
def test_an_expert_that_is_skipped_live_is_skipped_in_the_files(tmp_path, weight):
    own = case("qwen3", "lora")
    bake_model(own.loadout({"one": weight, "two": 0.5}), tmp_path / "out", dtype="float32")
    live = own.engine({"one": weight, "two": 0.5}).logits(tiny.tokens())
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, live, rtol=1e-4, atol=1e-5)
    bake_adapter(own.loadout({"one": weight, "two": 0.5}), tmp_path / "blend")
    theirs = tiny.peft_model(own.base, tmp_path / "blend")(tiny.tokens()).logits
    torch.testing.assert_close(theirs, live, rtol=1e-4, atol=1e-5)


def test_a_baked_adapter_names_a_base_that_peft_finds(loadout, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(loadout.base.source.path.parent)
    own = case("qwen3", "lora")
    relative = Case(Path(own.base.name), own.one, own.two).loadout(MIXED)
    bake_adapter(relative, tmp_path / "blend")
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "blend", dtype=torch.float32)
    live = own.engine(MIXED).logits(tiny.tokens())
    torch.testing.assert_close(model(tiny.tokens()).logits, live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare", "della"])
def test_a_rule_weighs_an_expert_in_a_method_as_its_weight_does(tmp_path, method):
    own = case("qwen3", "lora")
    found = []
    for number, weight in enumerate((0.5, [{"match": "*", "value": 0.5}])):
        loadout = with_method(own.loadout({"one": weight, "two": 0.25}), method=method, density=0.6)
        bake_model(loadout, tmp_path / str(number))
        found.append(load_file(tmp_path / str(number) / "model.safetensors"))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_a_bake_that_fails_verification_is_not_published(loadout, tmp_path):
    def differs(folder):
        assert (folder / "model.safetensors").exists()
        raise LmoeError("verify-failed", "they differ")

    with pytest.raises(LmoeError, match="differ"):
        bake_model(loadout, tmp_path / "out", verify=differs)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_for_vllm_has_one_rank_of_those_it_takes(loadout, tmp_path):
    report = bake_adapter(loadout, tmp_path / "out", target="vllm")
    assert {module["rank"] for module in report["modules"]} == {8}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["rank_pattern"] == {}
    with pytest.raises(UsageError, match="DoRA"):
        bake_adapter(case("qwen3", "dora").loadout(MIXED), tmp_path / "other", target="vllm")


def test_an_adapter_cut_to_a_rank_says_what_was_lost(loadout, tmp_path):
    own = case("qwen3", "lora")
    report = bake_adapter(loadout, tmp_path / "out", rank=3)
    exact, cut = (tiny.peft_model(own.base, folder) for folder in (_exact(loadout, tmp_path), tmp_path / "out"))
    deltas = [
        {
            name: module.get_delta_weight("default")
            for name, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        for model in (exact, cut)
    ]
    for module in report["modules"]:
        whole, left = (found[f"base_model.model.{module['name']}"] for found in deltas)
        assert module["rank"] == 3
        assert module["error"] == pytest.approx(float((whole - left).norm() / whole.norm()), rel=1e-3)
        assert module["error"] > 0.01


def _exact(loadout, folder):
    bake_adapter(loadout, folder / "exact")
    return folder / "exact"


def test_the_bytes_do_not_depend_on_threads_either(tmp_path, monkeypatch):
    """The last block of q_proj has seven rows: a product of few rows that threads split adds up in another order."""
    shape = {"hidden_size": 2560, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 52}
    base = tiny.save_base("qwen3", tmp_path / "base", num_attention_heads=8, num_key_value_heads=8, **shape)
    one = tiny.save_adapter(base, "lora", tmp_path / "one", rank=64)
    loadout = Case(base, one, one).loadout({"one": 0.7})
    digests, before = set(), torch.get_num_threads()
    while_baking, scratch = set(), rows.scratch
    monkeypatch.setattr(rows, "scratch", lambda *words: (while_baking.add(torch.get_num_threads()), scratch(*words))[1])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            report = bake_model(loadout, tmp_path / f"out{threads}", dtype="float32", jobs=threads)
            digests.add(report["files"]["model.safetensors"])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1
    assert while_baking == {1}


def test_a_bake_of_several_files_stops_everywhere_when_it_is_interrupted(loadout, tmp_path):
    def interrupt(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake_model(loadout, tmp_path / "out", shard_size=30_000, jobs=2, advance=interrupt)
    assert list(tmp_path.iterdir()) == []

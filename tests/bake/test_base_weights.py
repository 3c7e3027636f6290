"""A base that is stored quantised is baked from what its weights stand for, or from the model they were made from."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_quantised
import torch
from laws.cases import MIXED, Case, assert_close
from safetensors.torch import save_file

from lmoe_cli.bake.adapter import bake_adapter
from lmoe_cli.bake.base_weights import from_dequantized, from_original
from lmoe_cli.bake.model import bake_model
from lmoe_cli.bake.original import require_same_layout
from lmoe_cli.bake.plan import config_text, make_plan
from lmoe_cli.bake.verify import verify, verify_adapter
from lmoe_cli.checkpoint import dequantize
from lmoe_cli.engine.build import start
from lmoe_cli.errors import InvalidFileError, LmoeError, UsageError
from lmoe_cli.findings import RefusedError
from lmoe_cli.loadout.base import read_base
from lmoe_cli.loadout.dequantized import dequantized
from lmoe_cli.loadout.recipe import BakeSettings
from lmoe_cli.source import Folder

ROOT = Path(tempfile.mkdtemp(prefix="lmoe-quantised-"))
SHAPES = {"llama": tiny_quantised.WIDE, "gpt2": tiny_quantised.WIDE_GPT2}


@functools.cache
def original(arch="llama", seed=0):
    return tiny.save_base(arch, ROOT / f"{arch}-{seed}", seed, **SHAPES[arch])


@functools.cache
def packed(kind, arch="llama", dtype=torch.float32, **settings):
    folder = ROOT / "-".join(map(str, (arch, kind, dtype, *settings.values())))
    tiny_quantised.quantised(original(arch), kind, dtype, **settings).save_pretrained(folder)
    return folder


@functools.cache
def adapter(variant="lora", arch="llama", seed=1):
    return tiny.save_adapter(original(arch), variant, ROOT / f"{arch}-{variant}-{seed}", seed)


def case(base, variant="lora", arch="llama"):
    return Case(base, adapter(variant, arch), adapter("lora", arch, seed=9))


def loadout(kind, weights=MIXED, variant="lora", arch="llama", **settings):
    return case(packed(kind, arch, **settings), variant, arch).loadout(weights)


def base_at(folder):
    return read_base(Folder(str(folder), folder))


@pytest.mark.parametrize(
    ("kind", "arch"), [*((kind, "llama") for kind in tiny_quantised.KINDS), ("nf4", "gpt2"), ("int8", "gpt2")]
)
def test_weights_that_no_expert_changes_are_those_that_peft_dequantises(kind, arch, tmp_path):
    bake_model(loadout(kind, {"one": 0.0}, arch=arch).dequantized, tmp_path / "out", dtype="float32")
    theirs = tiny_quantised.dense(original(arch), packed(kind, arch)).state_dict()
    ours = tiny_quantised.tensors(tmp_path / "out")
    assert set(ours) == set(tiny_quantised.tensors(original(arch)))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_blend_is_what_peft_merges_into_the_dequantised_weights(kind, variant, tmp_path):
    dense = tiny_quantised.dense(original(), packed(kind))
    dense.save_pretrained(tmp_path / "dense")
    total = {name: tensor.double() for name, tensor in dense.state_dict().items()}
    own = case(packed(kind), variant)
    for folder, weight in ((own.one, MIXED["one"]), (own.two, MIXED["two"])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = tiny.peft_model(tmp_path / "dense", folder).merge_and_unload().state_dict()
        for name, tensor in merged.items():
            total[name] = total[name] + weight * (tensor.double() - dense.state_dict()[name].double())
    bake_model(own.loadout(MIXED).dequantized, tmp_path / "exact", dtype="float32")
    bake_model(own.loadout(MIXED).dequantized, tmp_path / "half")
    exact, half = (tiny_quantised.tensors(tmp_path / name) for name in ("exact", "half"))
    for name, tensor in exact.items():
        assert_close(tensor, total[name].float())
        assert torch.equal(tensor.bfloat16(), half[name])


@pytest.mark.parametrize("kind", tiny_quantised.KINDS)
def test_transformers_runs_it_as_an_ordinary_model_that_is_the_live_blend_but_for_the_quantised_products(
    kind, tmp_path
):
    bake_model(loadout(kind).dequantized, tmp_path / "out", dtype="float32")
    baked = tiny.load(tmp_path / "out")
    assert not hasattr(baked.config, "quantization_config")
    assert type(baked.model.layers[0].mlp.up_proj) is torch.nn.Linear
    engine = start(loadout(kind), device="cpu", dtype="float32")
    live = engine.logits(tiny.tokens())
    with torch.no_grad():
        plain = engine.detach()(tiny.tokens()).logits
        coarse = (plain - tiny_quantised.dense(original(), packed(kind))(tiny.tokens()).logits).abs().max()
        apart = (baked(tiny.tokens()).logits - live).abs().max()
    assert apart < 3 * coarse + 1e-3
    assert coarse < 0.1 * (live - plain).abs().max(), "the comparison would see nothing"


@pytest.mark.parametrize(
    ("kind", "dtype", "settings", "asked", "expected"),
    [
        ("nf4", torch.float16, {"compute": torch.bfloat16}, None, "bfloat16"),
        ("nf4", torch.float16, {}, None, "float16"),
        ("nf4", torch.float32, {}, None, "bfloat16"),
        ("int8", torch.float16, {}, None, "float16"),
        ("int8", torch.float32, {}, None, "bfloat16"),
        ("int8", torch.float16, {}, "float32", "float32"),
    ],
)
def test_it_is_written_in_16_bits_unless_32_are_asked_for(kind, dtype, settings, asked, expected, tmp_path):
    own = case(packed(kind, dtype=dtype, **settings)).loadout(MIXED).dequantized
    bake_model(own, tmp_path / "out", dtype=asked)
    assert {str(tensor.dtype) for tensor in tiny_quantised.tensors(tmp_path / "out").values()} == {f"torch.{expected}"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == expected


def test_its_config_says_nothing_of_quantisation_on_any_level(tmp_path):
    shutil.copytree(packed("nf4"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    inner = {"dtype": "float32", "quantization_config": config["quantization_config"], "model_type": "llama"}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "text_config": inner}))
    own = case(tmp_path / "base").loadout(MIXED).dequantized
    written = json.loads(config_text(own.base, make_plan(own).config))
    assert "quantization" not in json.dumps(written)
    assert (written["torch_dtype"], written["text_config"]["dtype"]) == ("bfloat16", "bfloat16")
    assert "dtype" not in written


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", tiny_quantised.KINDS)
def test_verification_accepts_it(kind, variant, tmp_path):
    own = loadout(kind, variant=variant).dequantized
    report = bake_model(own, tmp_path / "out", verify=lambda folder: verify(own, folder).as_dict())
    assert report["verify"]["difference"] < 0.1 * report["verify"]["effect"]


@pytest.mark.parametrize("fault", ["an expert dropped", "codes swapped", "scales shifted", "the original's weights"])
def test_verification_refuses_what_is_not_the_live_blend_on_the_dequantised_weights(fault, tmp_path, monkeypatch):
    own = loadout("nf4-nested").dequantized
    wrong = own
    if fault == "an expert dropped":
        wrong = loadout("nf4-nested", {"one": MIXED["one"]}).dequantized
    elif fault == "codes swapped":
        pairs = dequantize._pairs
        monkeypatch.setattr(dequantize, "_pairs", lambda numbers: pairs(numbers).flip(1))
    elif fault == "scales shifted":
        scales = dequantize._scales
        monkeypatch.setattr(dequantize, "_scales", lambda *arguments: scales(*arguments) * 1.01)
    else:
        wrong = case(original()).loadout(MIXED)
    with pytest.raises(LmoeError) as told:
        bake_model(wrong, tmp_path / "out", dtype="bfloat16", verify=lambda folder: verify(own, folder))
    assert told.value.code == "verify-failed"
    assert not (tmp_path / "out").exists()


def test_only_some_rows_are_dequantised_at_a_time_and_which_makes_no_difference(tmp_path, monkeypatch):
    whole = bake_model(loadout("nf4-nested").dequantized, tmp_path / "whole")
    asked = []
    rows_of = dequantize.Matrix.__getitem__

    def counting(self, rows):
        found = rows_of(self, rows)
        asked.append(found.numel())
        return found

    monkeypatch.setattr(dequantize.Matrix, "__getitem__", counting)
    monkeypatch.setattr("lmoe_cli.bake.blocks.BLOCK_ELEMENTS", 900)
    parts = bake_model(loadout("nf4-nested").dequantized, tmp_path / "parts", jobs=2)
    assert parts["files"] == whole["files"]
    assert len(asked) > 100
    assert max(asked) <= 900


def test_shards_are_read_and_written_wherever_the_parts_of_a_matrix_lie(tmp_path):
    shutil.copytree(packed("nf4-nested"), tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    where = {}
    for number, ending in enumerate(("weight", "absmax", "")):
        rest = {name: own for name, own in tiny_quantised.tensors(packed("nf4-nested")).items() if name not in where}
        shard = {name: own for name, own in rest.items() if name.endswith(ending)}
        where |= dict.fromkeys(shard, f"model-{number}.safetensors")
        save_file(shard, tmp_path / "shards" / f"model-{number}.safetensors", metadata={"format": "pt"})
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert len(case(tmp_path / "shards").loadout(MIXED).dequantized.base.weight_files) == 3
    bake_model(loadout("nf4-nested").dequantized, tmp_path / "one")
    bake_model(case(tmp_path / "shards").loadout(MIXED).dequantized, tmp_path / "many", shard_size=100_000)
    one, many = (tiny_quantised.tensors(tmp_path / name) for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_methods_work_on_the_dequantised_weights(method, tmp_path):
    tiny_quantised.dense(original(), packed("nf4")).save_pretrained(tmp_path / "dense")
    found = []
    for number, own in enumerate((loadout("nf4").dequantized, case(tmp_path / "dense").loadout(MIXED))):
        recipe = own.recipe.model_copy(update={"bake": BakeSettings(method=method)})
        bake_model(replace(own, recipe=recipe), tmp_path / str(number), dtype="float32")
        found.append(tiny_quantised.tensors(tmp_path / str(number)))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def from_it(kind, folder, weights=MIXED):
    """The choice of an original."""
    own = loadout(kind, weights).dequantized
    other = base_at(folder)
    return from_original(own, other, require_same_layout(own.base, other))


def test_from_the_original_the_files_are_those_of_a_bake_on_the_original(tmp_path):
    chosen = from_it("nf4", original())
    ours = bake_model(chosen.loadout, tmp_path / "ours", base_weights=chosen.facts)
    theirs = bake_model(case(original()).loadout(MIXED), tmp_path / "theirs")
    assert ours["files"] == theirs["files"]
    told = json.loads((tmp_path / "ours" / "bake-report.json").read_text())["base_weights"]
    assert told["choice"] == "original"
    assert told["quantized"]["ref"] == str(packed("nf4"))


@pytest.mark.parametrize(("kind", "arch"), [("nf4-nested", "llama"), ("int8", "llama"), ("nf4", "gpt2")])
def test_the_distances_told_are_those_from_what_peft_dequantises(kind, arch):
    own, other = loadout(kind, arch=arch).dequantized, base_at(original(arch))
    told = from_original(own, other, require_same_layout(own.base, other)).facts["distance"]
    ran, before = tiny_quantised.dense(original(arch), packed(kind, arch)).state_dict(), tiny.load(original(arch))
    matrices = {name for name, module in before.named_modules() if "h." in name or "layers." in name}
    expected = {
        name: float((tensor - ran[name]).norm() / tensor.norm())
        for name, tensor in before.state_dict().items()
        if name.removesuffix(".weight") in matrices and tensor.dim() == 2
    }
    assert told["tensors"] == pytest.approx(expected, rel=1e-4)
    assert told["worst"] == max(told["tensors"].values()) == told["tensors"][told["worst_in"]]
    assert told["mean"] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-4)
    assert 0.003 < told["mean"] < 0.15


def test_what_a_choice_changes_is_said():
    assert "this is the model that ran quantised" in from_dequantized(loadout("nf4").dequantized).meaning
    chosen = from_it("nf4", original())
    assert "not the model that ran quantised" in chosen.meaning
    assert f"{chosen.facts['distance']['mean']:.2%}" in chosen.meaning
    assert f"{chosen.facts['distance']['worst']:.2%}" in chosen.meaning


def trained_further(folder):
    """The original, each matrix moved by two hundredths of what its weights spread."""
    shutil.copytree(original(), folder)
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tiny_quantised.tensors(original()).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["nf4-nested", "fp4", "int8"])
@pytest.mark.parametrize("other", ["another seed", "trained further"])
def test_another_model_of_the_same_shapes_is_not_taken_for_the_original(kind, other, tmp_path):
    folder = original(seed=1) if other == "another seed" else trained_further(tmp_path / "near")
    with pytest.raises(RefusedError, match="not the original") as told:
        from_it(kind, folder)
    assert {item.code for item in told.value.findings} == {"original-differs"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: original("gpt2"), "is a gpt2, not a llama"),
        (lambda folder: packed("int8"), "stored quantised itself"),
        (lambda folder: tiny.save_base("llama", folder, **tiny_quantised.WIDE, vocab_size=80), r"is \(80, 128\), not"),
        (lambda folder: tiny.save_base("llama", folder, **tiny_quantised.WIDE, num_hidden_layers=1), "it has no model"),
    ],
)
def test_a_model_of_another_layout_is_refused_before_a_weight_is_read(make, reason, tmp_path):
    own, other = loadout("nf4").dequantized, base_at(make(tmp_path / "other"))
    with pytest.raises(RefusedError) as told:
        require_same_layout(own.base, other)
    assert any(re.search(reason, item.message) for item in told.value.findings)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_from_a_quantised_base_acts_on_what_its_weights_stand_for(kind, variant, tmp_path):
    own = loadout(kind, variant=variant)
    report = bake_adapter(own, tmp_path / "adapter", verify=lambda folder: verify_adapter(own, folder).as_dict())
    assert report["verify"]["difference"] < 1e-4 * report["verify"]["effect"]
    tiny_quantised.dense(original(), packed(kind)).save_pretrained(tmp_path / "dense")
    bake_model(own.dequantized, tmp_path / "model", dtype="float32")
    with torch.no_grad():
        theirs = tiny.peft_model(tmp_path / "dense", tmp_path / "adapter")(tiny.tokens()).logits
        assert_close(tiny.load(tmp_path / "model")(tiny.tokens()).logits, theirs)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(packed(kind).resolve())
    wrong = loadout(kind, {"one": MIXED["one"], "two": MIXED["two"] * 1.2}, variant)
    with pytest.raises(LmoeError, match="from the live blend"):
        bake_adapter(wrong, tmp_path / "wrong", verify=lambda folder: verify_adapter(own, folder))


@pytest.fixture
def foreign(tmp_path):
    """A base that is stored quantised by a method that lmoe does not read."""
    shutil.copytree(packed("nf4"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "other"
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


def test_what_lmoe_cannot_dequantise_it_does_not_read_as_numbers(foreign, tmp_path):
    with pytest.raises(RefusedError) as told:
        bake_model(case(foreign).loadout(MIXED).dequantized, tmp_path / "out")
    (item,) = told.value.findings
    assert (item.code, "--base-weights" in item.hint) == ("bake-quantized", False)
    with pytest.raises(UsageError, match="needs its weights") as refused:
        bake_adapter(case(foreign, "dora").loadout(MIXED), tmp_path / "out")
    assert refused.value.code == "bake-quantized"
    bake_adapter(case(foreign).loadout(MIXED), tmp_path / "out")  # plain LoRA asks for no weight of the base


def test_without_a_choice_both_are_named(tmp_path):
    with pytest.raises(RefusedError) as told:
        bake_model(loadout("nf4"), tmp_path / "out")
    (item,) = told.value.findings
    assert item.code == "bake-quantized"
    assert "--base-weights dequantized" in item.hint
    assert "--base-weights original --original REF" in item.hint


def test_an_adapter_of_other_shapes_shows_once_the_weights_are_taken_as_what_they_stand_for():
    from lmoe_cli.check import check

    narrow = tiny.save_base("llama", ROOT / "narrow", **{**tiny_quantised.WIDE, "intermediate_size": 96})
    other = tiny.save_adapter(narrow, "lora", ROOT / "narrow-lora")
    own = Case(packed("nf4"), other, other).loadout({"one": 1.0})
    assert "shape-mismatch" in {item.code for item in check(own.dequantized).findings}


def test_a_config_that_names_bitsandbytes_over_ordinary_weights_is_refused(tmp_path):
    shutil.copytree(original(), tmp_path / "base")
    shutil.copy(packed("nf4") / "config.json", tmp_path / "base" / "config.json")
    with pytest.raises(InvalidFileError, match="none of its matrices is packed"):
        dequantized(base_at(tmp_path / "base"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_checkpoint_runs_in_the_dtype_that_was_asked_for(kind):
    own = loadout(kind, dtype=torch.float16)
    assert own.base.runs_in == own.dequantized.base.runs_in == "float16"
    for found in (own, own.dequantized):
        model = start(found, device="cpu", dtype="float32").detach()
        kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        assert kinds == {torch.float32}

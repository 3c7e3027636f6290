"""A baked blend is the live blend: as a model in transformers, as an adapter in PEFT."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from laws.cases import CASES, EACH, MIXED, assert_close, case, fresh, mixed
from lmoe_cli.bake.adapter import bake_adapter
from lmoe_cli.bake.model import bake_model
from lmoe_cli.errors import UsageError
from lmoe_cli.findings import RefusedError

FEWER = [one for one in CASES if one.values in EACH or one.values[1] in ("dora", "embedding", "saved")]
"""Every kind of adapter and every architecture, and the kinds that meet the most of an architecture on each."""


@pytest.mark.parametrize(("arch", "variant"), FEWER)
def test_a_baked_model_computes_the_live_blend_in_transformers(arch, variant, tmp_path):
    loadout = case(arch, variant).loadout(MIXED)
    try:
        report = bake_model(loadout, tmp_path / "baked")
    except RefusedError as error:
        assert variant == "lora_bias"
        assert {item.code for item in error.findings} == {"bias-unbakeable"}
        return
    with torch.no_grad():
        assert_close(tiny.load(tmp_path / "baked")(tiny.tokens()).logits, mixed(arch, variant, "usual"))
    for expert in report["experts"].values():
        assert expert["matched"] == expert["tensors"] > 0


@pytest.mark.parametrize(("arch", "variant"), FEWER)
def test_a_baked_adapter_computes_the_live_blend_in_peft(arch, variant, tmp_path):
    own = case(arch, variant)
    try:
        bake_adapter(own.loadout(MIXED), tmp_path / "adapter")
    except UsageError as error:
        assert error.code == "adapter-inexpressible"
        # What one adapter of PEFT cannot hold: input scales, experts of a mixture.
        assert variant in ("ia3", "experts")
        return
    with torch.no_grad():
        theirs = tiny.peft_on(fresh(own.base), tmp_path / "adapter")(tiny.tokens()).logits
    assert_close(theirs, mixed(arch, variant, "usual"))


@pytest.mark.parametrize("variant", ["lora", "embedding", "saved", "head"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_untouched_tensors_keep_their_bytes_and_ties_are_cut_only_where_they_must_be(arch, variant, tmp_path):
    from safetensors.torch import load_file

    own = case(arch, variant)
    bake_model(own.loadout(MIXED), tmp_path / "baked")
    before, after = load_file(own.base / "model.safetensors"), load_file(tmp_path / "baked" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    report = json.loads((tmp_path / "baked" / "bake-report.json").read_text())
    listed = {tensor["name"] for tensor in report["tensors"]}
    assert changed == listed & set(before)
    config = json.loads((tmp_path / "baked" / "config.json").read_text())
    was_tied = "lm_head.weight" not in before
    assert ("lm_head.weight" in after) == (not was_tied or variant != "lora")
    assert config.get("tie_word_embeddings", True) == (was_tied and variant == "lora")

"""The bytes a bank says it holds are those of everything its experts bring."""

from __future__ import annotations

import pytest
from laws.cases import case
from safetensors.torch import load_file


@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias", "ia3", "saved", "saved_norm", "experts"])
def test_what_an_adapter_stores_is_what_its_bank_holds(variant):
    made = case("qwen3_moe" if variant == "experts" else "llama", variant)
    loadout = made.loadout({"one": 1.0})
    (expert,) = loadout.experts
    stored = load_file(expert.adapter.source.require("adapter_model.safetensors"))
    size = made.engine({"one": 1.0}).bank.size
    due = sum(tensor.nbytes for tensor in stored.values())
    assert due <= size < 1.5 * due

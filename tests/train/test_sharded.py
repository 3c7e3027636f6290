"""Experts on a base whose weights are spread over processes compute what they compute on a whole one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
import torch.distributed as dist
from laws.cases import MIXED, assert_close, case
from torch.distributed.tensor import DTensor
from train.made import base, config

from lmoe_cli.bank import product
from lmoe_cli.bank.bank import build_bank
from lmoe_cli.engine.attach import attach
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.base import read_base
from lmoe_cli.source import open_source
from lmoe_cli.train.stage import assemble, runs_of, shard


@pytest.fixture
def group(tmp_path):
    """A group of one process, whose weights are spread as over several."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_experts_are_put_on_a_spread_base(group, monkeypatch, arch, variant):
    """DoRA reads the weights when it is loaded; which kernels are fastest is measured on weights that are whole."""
    own = case(arch, variant)
    due = own.engine(MIXED).logits(tiny.tokens())
    monkeypatch.setattr(product, "ENOUGH", 0)
    monkeypatch.setattr(product, "LARGE_BYTES", 1)
    model = tiny.load(own.base).requires_grad_(False)
    shard(model, torch.device("cpu"))
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    bank = build_bank(model, own.loadout(MIXED), torch.float32)
    bank.gates.set(list(MIXED.values()))
    attach(model, bank.modules)
    with torch.no_grad():
        assert_close(model(input_ids=tiny.tokens()).logits, due)


def test_a_quantised_base_is_not_spread(tmp_path):
    made = config(tmp_path, [{"train": "experts", "steps": 1}], trainer={"shard": True})
    shutil.copytree(base(), tmp_path / "base")
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    quantised = told | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(quantised))
    loadout = replace(case("llama", "lora").loadout(MIXED), base=read_base(open_source(str(tmp_path / "base"))))
    with pytest.raises(UsageError) as caught:
        assemble(loadout, runs_of(made)[0], made, torch.device("cpu"), None)
    assert caught.value.code == "shard-quantized"

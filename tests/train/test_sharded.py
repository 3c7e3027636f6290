"""Experts on a base whose weights are spread over processes compute what they compute on a whole one."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.distributed as dist
from laws.cases import MIXED, assert_close, case

from lmoe_cli.bank import product
from lmoe_cli.bank.bank import build_bank
from lmoe_cli.engine.attach import attach
from lmoe_cli.train.stage import shard


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
    bank = build_bank(model, own.loadout(MIXED), torch.float32)
    bank.gates.set(list(MIXED.values()))
    attach(model, bank.modules)
    with torch.no_grad():
        assert_close(model(input_ids=tiny.tokens()).logits, due)

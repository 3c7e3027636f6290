"""A recipe's rules for modules: live, folded and baked they are weights like any other."""

from __future__ import annotations

import pytest
import torch

from laws import cases
from laws.cases import assert_close, case
from lmoe_cli.bake.model import bake_model
from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

KINDS = [
    pytest.param(arch, variant, id=f"{arch}-{variant}", marks=pytest.mark.xdist_group(arch))
    for arch, variant in sorted(cases.EACH)
    if arch in ("llama", "qwen3_moe") or variant != "lora"
    if arch in ("qwen3_moe", "mixtral") or variant not in ("experts", "gate")
]
WHOLE = [
    pytest.param(arch, variant, id=f"{arch}-{variant}", marks=pytest.mark.xdist_group(arch))
    for arch, variant in (("llama", "saved_norm"), ("gpt2", "bias"), ("qwen3_moe", "gate"))
]
"""Kinds that change modules which are no linear layers."""


@pytest.mark.parametrize(("arch", "variant"), KINDS)
def test_a_rule_for_all_modules_is_that_weight(arch, variant):
    own = case(arch, variant)
    rules = [{"match": "layers.0", "value": 0.5}, {"match": "*", "value": 0.5}]
    experts = {"one": {"adapter": str(own.one), "weight": rules}, "two": {"adapter": str(own.two), "weight": 0.7}}
    loadout = resolve(Recipe.model_validate({"base": str(own.base), "experts": experts}), "a test")
    live = start(loadout, device="cpu", dtype="float32").logits(cases.tiny.tokens())
    plain = own.engine({"one": 0.5, "two": 0.7})
    assert_close(live, plain.logits(cases.tiny.tokens()))
    plain.fold()
    assert_close(live, plain.logits(cases.tiny.tokens()))


@pytest.mark.parametrize(("arch", "variant"), WHOLE)
def test_what_is_baked_by_rules_is_what_ran(arch, variant, tmp_path):
    own = case(arch, variant)
    experts = {"one": {"adapter": str(own.one), "weight": [{"match": "*", "value": 0.5}]}}
    loadout = resolve(Recipe.model_validate({"base": str(own.base), "experts": experts}), "a test")
    bake_model(loadout, tmp_path / "baked")
    engine = start(loadout, device="cpu", dtype="float32")
    with torch.no_grad():
        baked = cases.tiny.load(tmp_path / "baked")(cases.tiny.tokens()).logits
    assert_close(engine.logits(cases.tiny.tokens()), baked)


@pytest.mark.parametrize(("arch", "variant"), WHOLE)
def test_whole_modules_take_a_blend_for_each_token(arch, variant):
    """With the weight of one row in each of its tokens, they compute what rows with that weight do."""
    engine = case(arch, variant).engine({"one": 0.5, "two": 0.7})
    rows = torch.tensor([[0.5, 0.7], [1.0, 0.0]])
    engine.set_gates(rows)
    due = engine.logits(cases.tiny.tokens())
    engine.set_gates(rows[:, None].expand(2, cases.tiny.tokens().shape[1], 2))
    assert_close(engine.logits(cases.tiny.tokens()), due)

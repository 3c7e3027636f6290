"""All variants run on one base, which is loaded once and stays as it was."""

from __future__ import annotations

import pytest
import tiny
import torch
from laws.cases import assert_close
from router.made import save_gate, settings

from evaluate.made import loadout, opened
from lmoe_cli.data.records import data_hash
from lmoe_cli.engine import build
from lmoe_cli.errors import NotFoundError
from lmoe_cli.evaluate.seen import about_seen
from lmoe_cli.evaluate.variants import plan


def names(found, **words):
    return [variant.name for variant in plan(found, **words)]


def test_the_variants_of_a_recipe():
    found = loadout(one="lora", two="lora")
    assert names(found) == ["base", "only one", "only two", "uniform", "recipe", "random"]
    assert names(found, without=["two", "two"], seed=None)[4:] == ["recipe", "without two"]
    with pytest.raises(NotFoundError) as caught:
        plan(found, without=["three"])
    assert (caught.value.code, caught.value.hint) == ("expert-unknown", "experts: one, two")


def test_one_expert_is_not_told_twice_and_no_expert_leaves_the_base():
    assert names(loadout(one="lora")) == ["base", "only one", "recipe", "random"]
    assert names(loadout()) == ["base", "recipe"]


def test_fixed_weights_are_those_of_the_recipe_all_on_one_bank():
    found = loadout(router={"type": "static"}, one={"weight": 0.5}, two={"weight": -0.25})
    by_name = {variant.name: variant for variant in plan(found, without=["one"])}
    weights = {name: tuple(variant.weights.values()) for name, variant in by_name.items()}
    assert weights == {
        "base": (0, 0), "only one": (1, 0), "only two": (0, 1), "uniform": (0.5, 0.5),
        "recipe": (0.5, -0.25), "without one": (0, -0.25), "random": (0.5, -0.25),
    }  # fmt: skip
    assert len({id(variant.loadout) for variant in by_name.values()}) == 1


def test_the_base_is_loaded_once_and_is_the_same_after_all_variants(monkeypatch):
    loads = []
    load = build.load_model
    monkeypatch.setattr(build, "load_model", lambda *words, **more: loads.append(1) or load(*words, **more))
    rules = [{"match": "layers.1", "value": 0.3}, {"match": "*", "value": 0.8}]
    other = loadout(only={"variant": "dora"})
    variants, stage = opened(loadout(one={"weight": rules}, two="lora"), others={"retrained": other}, without=["two"])
    before = stage.take(variants["base"]).logits(tiny.tokens())
    found = {name: stage.take(variant).logits(tiny.tokens()) for name, variant in variants.items()}
    assert torch.equal(stage.take(variants["base"]).logits(tiny.tokens()), before)
    assert len(loads) == 1
    assert list(found) == ["base", "only one", "only two", "uniform", "recipe", "without two", "random", "retrained"]
    for number, (name, logits) in enumerate(found.items()):
        assert all(not torch.allclose(logits, found[later], atol=1e-3) for later in list(found)[number + 1 :]), name


def test_a_recipe_with_rules_computes_as_written_and_its_experts_as_published():
    rules = [{"match": "layers.1", "value": 0.25}, {"match": "*", "value": 0.5}]
    found = loadout(one={"weight": rules})
    variants, stage = opened(found)
    written = stage.take(variants["recipe"]).logits(tiny.tokens())
    alone = stage.take(variants["only one"]).logits(tiny.tokens())
    assert_close(written, build.start(found, device="cpu", dtype="float32").logits(tiny.tokens()))
    model = tiny.peft_model(found.base.source.path, found.experts[0].adapter.source.path)
    with torch.no_grad():
        assert_close(alone, model(tiny.tokens()).logits)


@pytest.mark.parametrize(("split", "is_told"), [("all", True), ("train", True), ("valid", False)])
def test_a_gate_that_was_trained_on_the_file_is_told_unless_a_split_was_held_out(tmp_path, split, is_told):
    from dataclasses import replace

    from lmoe_cli.data.examples import Tally
    from lmoe_cli.evaluate.domains import Domain
    from lmoe_cli.loadout.trained import read_gate
    from lmoe_cli.source import open_source

    plain = loadout(one="lora")
    save_gate(tmp_path / "gate", plain, {"model.layers.0.mlp": 32}, settings())
    gate = replace(read_gate(open_source(str(tmp_path / "gate"))), data={"chat.jsonl": "a" * 64})
    found = replace(plain, gate=gate)
    same = Domain("talk", tmp_path / "other-name.jsonl", "a" * 64, split, (), Tally())
    different = replace(same, sha256="b" * 64)
    assert [item.code for item in about_seen(found, [same, different])] == ["eval-seen"] * is_told
    assert list(about_seen(plain, [same])) == []
    (tmp_path / "read.jsonl").write_text('{"text": "a"}\n')
    read = replace(same, sha256=data_hash(tmp_path / "read.jsonl"))
    encoder = loadout(router={"type": "encoder"}, one={"data": str(tmp_path / "read.jsonl")})
    assert [item.code for item in about_seen(encoder, [read, different])] == ["eval-seen"] * is_told

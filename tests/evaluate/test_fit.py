"""Weights that are found are the best there are, and what is written is what was found."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
import yaml
from commands import lmoe
from data.made import said, written
from laws.cases import MIXED, case

from evaluate.made import adapter, domain, loadout, nats_of, opened, spoken_base
from lmoe_cli.evaluate import groups
from lmoe_cli.evaluate.fit import Schedule, fit
from lmoe_cli.evaluate.losses import record_nats
from lmoe_cli.evaluate.variants import Variant, open_stage
from lmoe_cli.loadout.profile import matches
from lmoe_cli.loadout.recipe import Recipe


def by_peft(cases, weights):
    """Nats per token of one expert at some weights, with PEFT's own scaling turned."""
    model = tiny.peft_model(spoken_base(), adapter())
    scalings = [own for module in model.modules() if isinstance(own := getattr(module, "scaling", None), dict)]
    count, found = sum(case.count for case in cases), []
    for weight in weights:
        for scaling in scalings:
            scaling["default"] = 6 / 4 * weight
        found.append(sum(nats_of(model, case) for case in cases) / count)
    return found


def test_one_weight_ends_in_the_valley_where_it_began_by_peft(tmp_path):
    """A random model has several; that of weight 1 has its floor near 0.6."""
    variants, stage = opened(loadout(one="lora"))
    talks = domain(stage, tmp_path / "a.jsonl")
    (found,) = fit(stage.take(variants["recipe"]), [talks], [1.0], Schedule(150, 0.05))
    start, there, left, right = by_peft(talks.cases, [1.0, found, found - 0.05, found + 0.05])
    assert there < min(left, right)
    assert there < start - 0.05


@pytest.mark.parametrize(("arch", "variant"), [("llama", "saved_norm"), ("gpt2", "bias"), ("qwen3_moe", "gate")])
def test_weights_have_the_gradient_of_all_that_an_expert_changes(arch, variant):
    engine = case(arch, variant).engine(MIXED)

    def loss(weights):
        engine.bank.gates.set(weights)
        return engine.model(input_ids=tiny.tokens()).logits.log_softmax(-1)[..., 3].sum()

    weights = torch.tensor(list(MIXED.values()), requires_grad=True)
    (slope,) = torch.autograd.grad(loss(weights), weights)
    with torch.no_grad():
        steps = 1e-2 * torch.eye(2)
        measured = torch.stack([(loss(weights + step) - loss(weights - step)) / 2e-2 for step in steps])
    torch.testing.assert_close(slope, measured, rtol=0.02, atol=1e-3)


def test_domains_count_the_same_however_long_they_are(tmp_path):
    """A domain that is there three times as often pulls no more than its mean does."""
    variants, stage = opened(loadout(one="lora", two="lora"))
    engine = stage.take(variants["recipe"])
    few = domain(stage, tmp_path / "a.jsonl", said("a", "yes, yes"))
    many = domain(stage, tmp_path / "b.jsonl", *[said("b", "no, not so")] * 3, name="other")
    once = domain(stage, tmp_path / "c.jsonl", said("b", "no, not so"), name="other")
    schedule = Schedule(60, 0.05)
    assert fit(engine, [few, many], [0.5, 0.5], schedule) == pytest.approx(
        fit(engine, [few, once], [0.5, 0.5], schedule), abs=0.02
    )


def test_parts_of_experts_are_the_experts_where_all_weights_are_one(tmp_path):
    found = loadout(one="lora", two="embedding")
    plain = found.published
    split = groups.split(plain, groups.layer_groups(plain, 2))
    assert {pattern for _, pattern in split.parts} == {"layers.0", "layers.1", "*"}
    stage = open_stage([Variant("all", "recipe", split.loadout, {})], device="cpu", dtype="float32")
    names = [expert.name for expert in split.loadout.experts]
    weights = {"one": 0.5, "two": -0.7}
    stage.engine.set_weights({name: weights[own] for name, (own, _) in zip(names, split.parts, strict=True)})
    parted = stage.engine.logits(tiny.tokens())
    variants, whole = opened(found)
    engine = whole.take(variants["recipe"])
    engine.set_weights(weights)
    torch.testing.assert_close(parted, engine.logits(tiny.tokens()), rtol=1e-4, atol=1e-4)


def test_groups_are_neighbouring_layers_that_leave_none_out():
    plain = loadout(one="lora").published
    assert groups.layer_groups(plain, 1) == ["layers.0-1"]
    assert groups.layer_groups(plain, 2) == ["layers.0", "layers.1"]
    for module in plain.experts[0].adapter.parts:
        assert sum(matches(pattern, module) for pattern in groups.layer_groups(plain, 2)) == 1


def test_a_recipe_begins_with_what_its_rules_say():
    rules = [{"match": "layers.0.mlp", "value": 0.4}, {"match": "layers.0", "value": 0.8}, {"match": "*", "value": -1}]
    found = loadout(one={"weight": rules})
    plain = found.published
    split = groups.split(plain, ["layers.0", "layers.1"])
    # Of the seven linear layers of a block three are the mlp's.
    assert groups.starts(found, split) == pytest.approx([(3 * 0.4 + 4 * 0.8) / 7, -1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(spoken_base(), folder / "base")
    shutil.copytree(adapter(), folder / "one")
    shutil.copytree(adapter(seed=2, rank=5), folder / "two")
    (folder / "mix.yaml").write_text(
        "base: ./base\nexperts: {one: {adapter: ./one, weight: 0.5}, two: {adapter: ./two, weight: 0}}\n"
    )
    (folder / "none.yaml").write_text("base: ./base\nexperts: {}\n")
    talks = [said(f"question {number}", f"the answer is {number}") for number in range(40)]
    written(folder / "talk.jsonl", *talks)
    split = [{**talk, "split": "train" if number % 4 else "valid"} for number, talk in enumerate(talks)]
    written(folder / "split.jsonl", *split)
    return folder


def fitted(*words, cwd, code=0):
    done = lmoe("fit", *words, "--device", "cpu", "--json", cwd=cwd)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", [(), ("--groups", "2")])
def test_the_recipe_that_is_written_has_the_loss_that_is_told(place, tmp_path, words):
    target = tmp_path / "found.yaml"
    told = fitted("mix.yaml", "--data", "split.jsonl", "--out", target, "--steps", "20", *words, cwd=place)
    assert told["schema"] == "lmoe.fit/1"
    data = told["data"]
    assert set(data) == {"recipe", "out", "weights", "nats_per_token", "data", "settings"}
    assert len(data["weights"]) == (4 if words else 2)
    held_out = data["nats_per_token"]["held_out"]
    assert (held_out["records"], data["nats_per_token"]["train"]["records"]) == (10, 30)
    assert data["nats_per_token"]["train"]["found"] < data["nats_per_token"]["train"]["start"]
    done = lmoe("eval", target, "--data", "split.jsonl", "--device", "cpu", "--no-random", "--json", cwd=place)
    recipe = {variant["name"]: variant for variant in json.loads(done.stdout)["data"]["variants"]}["recipe"]
    assert recipe["mean"]["nats_per_token"] == pytest.approx(held_out["found"], abs=1e-5)
    recipe = Recipe.model_validate(yaml.safe_load(target.read_text()))
    assert recipe.router.type == "weighted"
    assert isinstance(recipe.experts["one"].weight, list) == bool(words)


def test_a_fraction_is_held_out_where_lines_do_not_say(place, tmp_path):
    told = fitted(
        "mix.yaml", "--data", "talk.jsonl", "--out", tmp_path / "a.yaml", "--steps", "2", "--held-out", "0.3", cwd=place
    )
    loss = told["data"]["nats_per_token"]
    assert loss["held_out"]["records"] + loss["train"]["records"] == 40
    assert 3 < loss["held_out"]["records"] < 22
    told = fitted(
        "mix.yaml", "--data", "talk.jsonl", "--out", tmp_path / "b.yaml", "--steps", "2", "--held-out", "0", cwd=place
    )
    assert told["data"]["nats_per_token"]["held_out"] is None
    assert [item["code"] for item in told["findings"]] == ["fit-unjudged"]


def test_nothing_is_written_where_something_stands_or_is_wrong(place, tmp_path):
    target = tmp_path / "found.yaml"
    target.write_text("mine")
    told = fitted("mix.yaml", "--data", "talk.jsonl", "--out", target, cwd=place, code=2)
    assert [item["code"] for item in told["findings"]] == ["output-exists"]
    assert target.read_text() == "mine"
    new = tmp_path / "new.yaml"
    for words, code, name in (
        (("mix.yaml", "--data", "none.jsonl"), 3, "not-found"),
        (("mix.yaml",), 2, "usage"),
        (("none.yaml", "--data", "talk.jsonl"), 2, "usage"),
        (("mix.yaml", "--data", "talk.jsonl", "--groups", "3"), 2, "usage"),
        (("mix.yaml", "--data", "talk.jsonl", "--rate", "nan"), 2, "usage"),
        (("mix.yaml", "--data", "talk.jsonl", "--held-out", "nan"), 2, "usage"),
        (("mix.yaml", "--data", "talk.jsonl", "--seed", "99999999999999999999"), 2, "usage"),
    ):
        told = fitted(*words, "--out", new, cwd=place, code=code)
        assert [item["code"] for item in told["findings"]] == [name]
        assert not new.exists()


def test_judging_does_not_change_what_is_judged(tmp_path):
    variants, stage = opened(loadout(one="lora"))
    talks = domain(stage, tmp_path / "a.jsonl")
    engine = stage.take(variants["recipe"])
    before = record_nats(engine, talks.cases)
    fit(engine, [talks], [1.0], Schedule(3, 0.05))
    engine.set_weights(one=1.0)
    torch.testing.assert_close(record_nats(engine, talks.cases), before, rtol=0, atol=0)

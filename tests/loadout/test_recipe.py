"""Recipes: what they may say, and how every mistake is told with its place."""

from __future__ import annotations

import pytest
from pace import within

from lmoe_cli.errors import NotFoundError
from lmoe_cli.findings import RefusedError
from lmoe_cli.loadout import text
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.loadout.profile import matches, weight_at
from lmoe_cli.loadout.recipe import Recipe, WeightRule
from lmoe_cli.loadout.routers import BUILT_IN
from lmoe_cli.router import registry

GOOD = """
version: 1
name: battlemage
description: 60% warrior, 30% mage
base: demo:adventurer
experts:
  warrior: {adapter: demo:warrior, weight: 0.6}
  mage:
    adapter: demo:mage
    weight:
      - {match: "layers.0-1", value: 1e-1}
      - {match: "*.q_proj", value: -0.2}
    examples: ["cast a spell"]
router: {type: weighted, on_change: keep}
modules_to_save: {take: mage}
chat: {system: on, temperature: 0, stop: ["\\n\\n"], seed: 7}
bake: {method: ties, density: 0.3, dtype: bfloat16}
"""


def read(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_recipe(path)


def told(tmp_path, content):
    with pytest.raises(RefusedError) as caught:
        read(tmp_path, content)
    assert caught.value.exit_code == 2
    return [item.message.replace(str(tmp_path) + "/", "") + (" | " + item.hint if item.hint else "")
            for item in caught.value.findings]  # fmt: skip


def test_a_recipe_says_what_it_says(tmp_path):
    recipe = read(tmp_path, GOOD)
    assert recipe.experts["warrior"].weight == 0.6
    assert recipe.experts["mage"].weight[0].value == 0.1
    assert recipe.chat.system == "on"
    assert recipe.chat.temperature == 0
    assert recipe.router.on_change == "keep"
    assert recipe.bake.method == "ties"


def test_every_mistake_is_told_at_once_with_line_column_and_the_word_that_was_meant(tmp_path):
    found = told(
        tmp_path,
        "bse: demo:adventurer\n"
        "experts:\n"
        "  mage: {adapter: demo:mage, wieght: 1}\n"
        "  2nd: {adapter: demo:mage}\n"
        "  healer: {adapter: demo:healer, weight: much}\n"
        "  rogue: {weight: 0.5}\n"
        "  bard: {adapter: x/y, weight: [{match: mlp, vale: 1}]}\n"
        "router: {type: weigted}\n"
        "chat: {temperature: hot, max_new_token: 3}\n"
        "bake: {method: tie}\n",
    )
    places = [message.split(": ")[0] for message in found]
    assert places == [
        "recipe.yaml:1:1", "recipe.yaml:1:1", "recipe.yaml:3:30", "recipe.yaml:4:3", "recipe.yaml:5:42",
        "recipe.yaml:6:3", "recipe.yaml:7:33", "recipe.yaml:7:46", "recipe.yaml:8:9", "recipe.yaml:9:21",
        "recipe.yaml:9:26", "recipe.yaml:10:16",
    ]  # fmt: skip
    everything = "\n".join(found)
    for word in ("'base'", "'weight'", "'value'", "'weighted'", "'max_new_tokens'", "'ties'"):
        assert word in everything


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        ("   \n# only a comment\n", "empty"),
        ("- a\n- b\n", "mapping"),
        ("just words", "mapping"),
        ("base: [unclosed", "1:"),
        ("base: a\nbase: b\nexperts: {}", "2:1: the key 'base' stands twice"),
        ("base: &anchor a\nexperts: {x: {adapter: *anchor}}", "anchors"),
        ("x: {<<: {a: 1}}", "merge keys"),
        ("base: !!python/object/apply:os.system ['true']", "tags"),
        ("base: a\n---\nbase: b", "second document"),
        ("base: .nan", ".nan is not a number"),
        ("? [a, b]\n: c", "keys must be plain words"),
        (b"base: \xff\xfe", "not UTF-8"),
        ("base: \x07", "1:"),
        ("[" * 40 + "]" * 40, "nested deeper"),
        ("a: {" * 5000, "nested deeper"),
        ("base: x\nexperts: {a: {adapter: y, weight: 101}}", "less than or equal to 100"),
        ("base: x\nexperts: {a: {adapter: y, weight: true}}", "valid number"),
        ("base: x\nexperts: {a: {adapter: y, weight: '1'}}", "valid number"),
        ("base: x\nexperts: {a: {adapter: y, weight: []}}", "at least 1 item"),
        ("base: x\nexperts: {a: {adapter: ''}}", "at least 1 character"),
        ("version: 2\nbase: x\nexperts: {a: {adapter: y}}", "version cannot be 2"),
        ("base: x\nexperts: {a: {adapter: y}}\nmodules_to_save: {take: b}", "'b', which is no expert"),
        ("base: x\nexperts: {a: {adapter: y}}\nrouter: {type: static, on_change: keep}", "no key 'on_change'"),
    ],
)
def test_what_is_no_recipe_is_told_in_one_line(tmp_path, content, reason):
    found = told(tmp_path, content)
    assert any(reason in message for message in found), found
    assert all(message.startswith("recipe.yaml:") for message in found)


@pytest.mark.parametrize(
    ("content", "step"),
    [
        ("", "`lmoe schema"),
        ("just words", "`lmoe schema"),
        ("base: x", "known keys: bake, base, "),
        ("base: x\nexperts:\n\ta: {adapter: y}", "spaces indent"),
        ("base: a\nbase: b\nexperts: {}", "keep one"),
        ("base: &anchor a", "write the value out"),
        ("base: a\n---\nbase: b", "file of its own"),
        ("base: x\nexpert: {}", "did you mean 'experts'"),
        (b"base: \xff\xfe", "as UTF-8"),
    ],
)
def test_what_is_no_recipe_is_told_with_a_next_step(tmp_path, content, step):
    assert any(step in message.partition(" | ")[2] for message in told(tmp_path, content))


def test_size_is_bounded_in_bytes_and_values_and_refused_quickly(tmp_path):
    with within(600):
        assert "values" in told(tmp_path, "\n".join(f"k{number}: 1" for number in range(100_000)))[0]
        with pytest.raises(Exception, match="at most"):
            read(tmp_path, "a: " + "x" * (2 << 20))
        assert "values" in told(tmp_path, "a: [" + "1, " * 300_000 + "]")[0]


def test_a_missing_recipe_is_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        read_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1e-4", 1e-4), ("1E3", 1e3), ("-.5", -0.5), ("3", 3), ("0o7", "0o7"), ("on", "on"), ("no", "no"), ("~", None),
     ("null", None), ("True", True), ("'1'", "1"), ("1_000", "1_000"), ("12:30", "12:30")],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(written, meant):
    assert text.parse_yaml(f"key: {written}".encode(), "x").data == {"key": meant}


@pytest.mark.parametrize(
    ("pattern", "module", "verdict"),
    [
        ("mlp", "model.layers.0.mlp.up_proj", True),
        ("mlp", "model.layers.0.self_attn.q_proj", False),
        ("up_proj", "model.layers.0.mlp.up_proj", True),
        ("proj", "model.layers.0.mlp.up_proj", False),
        ("*_proj", "model.layers.0.mlp.up_proj", True),
        ("*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*.q_proj", "q_proj", True),
        ("layers.0-11", "model.layers.11.mlp.up_proj", True),
        ("layers.0-11", "model.layers.12.mlp.up_proj", False),
        ("layers.0-11.mlp", "model.layers.3.mlp.up_proj", True),
        ("layers.0-11.mlp", "model.layers.3.self_attn.q_proj", False),
        ("layers.3", "model.layers.30.mlp.up_proj", False),
        ("layers.3", "model.layers.3.mlp.up_proj", True),
        ("*", "anything.at.all", True),
        ("0-1", "transformer.h.1.attn.c_attn", True),
        ("model.layers", "layers", False),
    ],
)
def test_a_rule_names_consecutive_parts_of_a_module(pattern, module, verdict):
    assert matches(pattern, module) is verdict


def test_the_first_rule_that_matches_counts_and_the_rest_keep_weight_1():
    rules = [WeightRule(match="layers.0", value=0.2), WeightRule(match="mlp", value=0.5)]
    assert weight_at(rules, "model.layers.0.mlp.up_proj") == 0.2
    assert weight_at(rules, "model.layers.1.mlp.up_proj") == 0.5
    assert weight_at(rules, "model.layers.1.self_attn.q_proj") == 1.0


def test_every_router_of_a_recipe_can_be_loaded():
    assert set(BUILT_IN) == {"static", "weighted", "encoder", "arrow", "gate"}
    for name in BUILT_IN:
        words = {"type": name, "artefact": "./router"} if name == "gate" else {"type": name}
        recipe = Recipe.model_validate({"base": "org/base", "experts": {}, "router": words})
        assert recipe.router.type == name
        assert registry.load(recipe.router)(recipe.router, {"one": 0.5}).gates().tolist() == [[0.5]]

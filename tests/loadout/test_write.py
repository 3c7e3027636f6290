"""A recipe that is written reads as the same recipe, wherever it lies."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st

from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import parse_recipe, read_recipe
from lmoe_cli.loadout.recipe import BakeSettings, ChatSettings, ExpertEntry, Recipe, WeightRule
from lmoe_cli.loadout.text import parse_yaml
from lmoe_cli.loadout.write import SCHEMA_URL, moved, recipe_text, with_weights

TRAPS = [
    "on",
    "1e-4",
    "~",
    "null",
    "12",
    ".5",
    "+.NaN",
    "- a",
    "a: b",
    "#",
    "'",
    '"',
    "\n",
    " x",
    "x ",
    "\x85",
    "\ufeff",
]
text = st.one_of(st.sampled_from(TRAPS), st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
named = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
names = st.builds(str.__add__, st.sampled_from(string.ascii_letters), st.text(string.ascii_letters + "-_9", max_size=9))
numbers = st.floats(-100, 100)
rules = st.lists(st.builds(WeightRule, match=named, value=numbers), min_size=1, max_size=3)
experts = st.builds(
    ExpertEntry,
    adapter=named,
    weight=st.one_of(numbers, rules),
    accept_base=st.lists(text, max_size=2),
    examples=st.lists(text, max_size=2),
)
recipes = st.builds(
    Recipe,
    name=text,
    description=text,
    base=named,
    experts=st.dictionaries(names, experts, max_size=3),
    router=st.sampled_from(
        [
            {"type": "weighted"},
            {"type": "weighted", "on_change": "keep"},
            {"type": "static"},
            {"type": "static", "fold": False},
        ]
    ),
    modules_to_save=st.sampled_from(["refuse", "blend"]),
    skip_below=st.floats(0, 0.99),
    chat=st.builds(
        ChatSettings,
        system=st.none() | text,
        temperature=st.floats(0, 10),
        top_k=st.integers(0, 1000),
        seed=st.none() | st.integers(0, 2**63 - 1),
        stop=st.lists(named, max_size=3),
    ),
    bake=st.builds(BakeSettings, dtype=st.sampled_from([None, "bfloat16"]), density=st.floats(0.1, 1)),
)


def read(written):
    return parse_recipe(parse_yaml(written.encode(), "written"))


@given(recipes)
@example(Recipe(base="1e5", experts={}, description="two\n  lines\n\n", chat=ChatSettings(system="\n leading")))
def test_what_is_written_reads_the_same(recipe):
    assert read(recipe_text(recipe)) == recipe


def test_what_is_at_its_default_is_left_out_and_the_rest_stands_in_order():
    recipe = Recipe(
        name="battlemage",
        base="demo:adventurer",
        experts={
            "warrior": ExpertEntry(adapter="demo:warrior", weight=0.6),
            "mage": ExpertEntry(adapter="demo:mage", weight=[WeightRule(match="layers.0-1", value=0.3)]),
            "healer": ExpertEntry(adapter="demo:healer"),
        },
        chat=ChatSettings(system="Be brave.\nBe kind.", temperature=0),
    )
    assert (
        recipe_text(recipe)
        == f"""\
# yaml-language-server: $schema={SCHEMA_URL}
version: 1
name: battlemage
base: demo:adventurer
experts:
  warrior:
    adapter: demo:warrior
    weight: 0.6
  mage:
    adapter: demo:mage
    weight:
      - {{match: layers.0-1, value: 0.3}}
  healer:
    adapter: demo:healer
chat:
  system: |-
    Be brave.
    Be kind.
  temperature: 0.0
"""
    )


@given(recipes)
def test_weights_at_rest_change_nothing(recipe):
    knobs = {
        name: 1.0 if isinstance(entry.weight, list) else float(f"{entry.weight:.10g}")
        for name, entry in recipe.experts.items()
    }
    turned = with_weights(recipe, knobs)
    assert all(turned.experts[name].weight == pytest.approx(entry.weight) for name, entry in recipe.experts.items()
               if not isinstance(entry.weight, list))  # fmt: skip
    assert all(
        turned.experts[name] == entry for name, entry in recipe.experts.items() if isinstance(entry.weight, list)
    )


def weight(recipe, name):
    given = recipe.experts[name].weight
    return [(rule.match, rule.value) for rule in given] if isinstance(given, list) else given


def test_a_knob_multiplies_the_rules_and_is_the_weight_of_what_no_rule_names():
    some = [WeightRule(match="mlp", value=0.3), WeightRule(match="*.q_proj", value=-2)]
    every = [WeightRule(match="mlp", value=0.5), WeightRule(match="*", value=0.2)]
    recipe = Recipe(
        base="b",
        experts={
            "plain": ExpertEntry(adapter="a"),
            "some": ExpertEntry(adapter="a", weight=some),
            "every": ExpertEntry(adapter="a", weight=every),
        },
    )
    turned = with_weights(recipe, {"plain": -0.25, "some": 0.7, "every": 0.5})
    assert weight(turned, "plain") == -0.25
    assert weight(turned, "some") == [("mlp", 0.21), ("*.q_proj", -1.4), ("*", 0.7)]
    assert weight(turned, "every") == [("mlp", 0.25), ("*", 0.1)]
    assert with_weights(recipe, {"plain": 0.5}).experts["some"] == recipe.experts["some"]


@pytest.mark.parametrize("knob", [101.0, float("inf"), float("nan")])
def test_a_weight_that_no_recipe_can_hold_is_refused(knob):
    recipe = Recipe(base="b", experts={"mage": ExpertEntry(adapter="a")})
    with pytest.raises(UsageError, match="mage"):
        with_weights(recipe, {"mage": knob})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.save_base("llama", folder / "models" / "base")
    tiny.save_adapter(folder / "models" / "base", "lora", folder / "mage")
    (folder / "one.yaml").write_text("base: models/base\nexperts:\n  mage: {adapter: ./mage}\n")
    return folder


@pytest.mark.parametrize(
    ("to", "base", "mage"),
    [
        (".", "./models/base", "./mage"),
        ("models", "./base", "{place}/mage"),
        ("models/new", "{place}/models/base", "{place}/mage"),
    ],
)
def test_a_recipe_that_moves_means_the_same_folders(place, to, base, mage, monkeypatch, tmp_path):
    loadout = resolve(read_recipe(place / "one.yaml"), "one.yaml", beside=place)
    recipe = moved(loadout, place / to)
    assert recipe.base == base.format(place=place)
    assert recipe.experts["mage"].adapter == mage.format(place=place)
    monkeypatch.chdir(tmp_path)
    again = resolve(recipe, "again", beside=place / to)
    assert again.base.source.path.resolve() == loadout.base.source.path.resolve()
    assert again.experts[0].adapter.source.path.resolve() == loadout.experts[0].adapter.source.path.resolve()


def test_a_recipe_found_from_the_working_directory_still_resolves_elsewhere(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    recipe = moved(resolve(read_recipe(Path("one.yaml")), "one.yaml", beside=Path()), tmp_path)
    monkeypatch.chdir("/")
    assert resolve(recipe, "again", beside=tmp_path).base.source.path.samefile(place / "models" / "base")

"""An encoder sends a prompt to the experts whose texts are like it, by vectors that transformers gives as well."""

from __future__ import annotations

import random
import subprocess
import sys
import types

import pytest
import tiny
import torch
from laws.cases import case
from tiny_tokenizer import save_tokenizer

import lmoe_cli
from demo_model.scenes import draw_scene
from demo_model.tables import read_tables
from lmoe_cli.check import check
from lmoe_cli.engine.build import start
from lmoe_cli.errors import UsageError
from lmoe_cli.findings import RefusedError
from lmoe_cli.loadout.examples import MOST, texts_of
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.write import moved, recipe_text

EXAMPLES = {
    "warrior": ["A goblin blocks the bridge.", "Three wolves attack us!", "Bandits ambush the camp."],
    "mage": ["The door is sealed by magic.", "A glowing rune covers the gate.", "A spirit haunts the tower."],
    "healer": ["My friend is wounded.", "A child was poisoned.", "The villagers are sick with fever."],
}
FIGHT, SICK = "Two trolls attack the village.", "My brother is sick with fever."


def demo(entries=None, **router):
    """The demo's three experts with texts of their own."""
    entries = entries or {name: {"examples": texts} for name, texts in EXAMPLES.items()}
    experts = {name: {"adapter": f"demo:{name}", **entry} for name, entry in entries.items()}
    return Recipe.model_validate(
        {"base": "demo:adventurer", "experts": experts, "router": {"type": "encoder"} | router}
    )


def engine_of(*args, **words):
    return lmoe_cli.load(demo(*args, **words), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def engine():
    return engine_of()


def embedded(engine, text, layer):
    """What transformers' hidden states say of a text."""
    with engine.alone() as model, torch.no_grad():
        ids = engine.tokenizer(text, return_tensors="pt")["input_ids"]
        states = model(ids, output_hidden_states=True).hidden_states  # what enters each block, and what leaves the last
    return states[layer + 1][0, 1:].mean(0)


def by_hand(vectors, of_prompt, temperature, top_k=None):
    """Gates from vectors of texts, one list per expert, by cosines alone."""
    unit = [torch.stack([vector / vector.norm() for vector in own]).mean(0) for own in vectors]
    centre = sum(unit) / len(unit)
    prompt = of_prompt / of_prompt.norm() - centre
    cosines = torch.stack([torch.dot(prompt, own - centre) / prompt.norm() / (own - centre).norm() for own in unit])
    if top_k is not None:
        cosines = cosines.masked_fill(cosines < cosines.sort(descending=True).values[top_k - 1], -torch.inf)
    powers = (cosines / temperature).exp()
    return powers / powers.sum()


def routed(engine, prompt):
    engine.stream(prompt)
    return engine.router.routed


# -- the vectors


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_a_text_is_the_mean_of_what_leaves_a_block_without_the_first_token(engine, layer):
    one = engine if layer is None else engine_of(layer=layer)
    number = (one.model.config.num_hidden_layers - 1) // 2 if layer is None else layer
    assert layer is not None or number == 1
    for text in (FIGHT, "A riddle"):
        torch.testing.assert_close(one.embed(text), embedded(one, text, number), rtol=1e-4, atol=1e-5)


def test_a_text_of_one_token_is_that_token(engine):
    (token,) = engine.tokenizer("a")["input_ids"]
    with engine.alone() as model, torch.no_grad():
        expected = model(torch.tensor([[token]]), output_hidden_states=True).hidden_states[2][0, 0]
    torch.testing.assert_close(engine.embed("a"), expected, rtol=1e-4, atol=1e-5)


def test_a_text_longer_than_the_model_holds_is_embedded_by_its_beginning(engine):
    long = "wolf " * (engine.context + 5)
    tokens = engine.tokenizer(long)["input_ids"]
    assert len(tokens) > engine.context
    short = engine.tokenizer.decode(tokens[: engine.context])
    assert len(engine.tokenizer(short)["input_ids"]) == engine.context
    torch.testing.assert_close(engine.embed(long), engine.embed(short))


def test_embedding_sees_the_base_whatever_the_weights_and_leaves_them_as_they_are():
    engine = engine_of()
    before = engine.embed(FIGHT)
    prompt = torch.tensor([engine.encode(FIGHT)])
    engine.set_weights(warrior=3.0, mage=-2.0)
    blended = engine.logits(prompt)
    assert torch.equal(engine.embed(FIGHT), before)
    assert torch.equal(engine.logits(prompt), blended)
    engine.set_gates([[0.3, 0.0, 2.0]])
    given = engine.logits(prompt)
    assert not torch.allclose(given, blended, atol=1e-2)
    assert torch.equal(engine.embed(FIGHT), before)
    assert torch.equal(engine.logits(prompt), given)


# -- from vectors to gates


@pytest.mark.parametrize(("temperature", "top_k"), [(0.1, None), (0.5, None), (0.3, 2), (0.3, 1), (0.3, 7)])
def test_gates_are_the_softmax_of_cosines_to_the_mean_of_each_expert(temperature, top_k):
    engine = engine_of(temperature=temperature, **({} if top_k is None else {"top_k": top_k}))
    vectors = [[embedded(engine, text, 1) for text in texts] for texts in EXAMPLES.values()]
    for prompt in (FIGHT, SICK, "Where does this road lead?"):
        expected = by_hand(vectors, embedded(engine, prompt, 1), temperature, top_k and min(top_k, 3))
        found = routed(engine, prompt)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert int((found > 0).sum()) == min(top_k or 3, 3)


def test_weights_multiply_what_the_encoder_says():
    engine = engine_of({name: {"examples": texts, "weight": 0.5} for name, texts in EXAMPLES.items()}, temperature=1.0)
    said = routed(engine, SICK)
    engine.set_weights(healer=2.0, mage=0.0)
    torch.testing.assert_close(engine.bank.gates.values[0], said * torch.tensor([0.5, 0.0, 2.0]))


def test_an_expert_without_company_gets_every_prompt():
    engine = engine_of({"mage": {"examples": EXAMPLES["mage"]}})
    assert routed(engine, FIGHT).tolist() == [1.0]


def test_prompts_of_a_kind_go_to_the_expert_with_examples_of_that_kind():
    kinds = {"attack": "warrior", "curse": "mage", "wounded": "healer"}
    tables, drawn, unseen = read_tables(), {}, {}
    for held_out, found, most in ((False, drawn, 24), (True, unseen, 25)):
        dice = random.Random(3)
        while any(len(found.get(kind, ())) < most for kind in kinds):
            scene, prompt = draw_scene(tables, dice, held_out=held_out)
            if scene.kind in kinds and len(found.setdefault(scene.kind, [])) < most:
                found[scene.kind].append(prompt)
    engine = engine_of({expert: {"examples": drawn[kind]} for kind, expert in kinds.items()})
    right = 0
    for kind, expert in kinds.items():
        for prompt in unseen[kind]:
            right += int(routed(engine, prompt).argmax()) == list(kinds.values()).index(expert)
    assert right >= 0.75 * 75, right


def test_another_load_routes_to_the_last_bit_alike(engine):
    assert torch.equal(routed(engine, SICK), routed(engine_of(), SICK))


# -- which text decides


TALK = [
    {"role": "system", "content": "You are an adventurer."},
    {"role": "user", "content": FIGHT},
    {"role": "assistant", "content": "I draw my sword."},
    {"role": "user", "content": SICK},
]


@pytest.mark.parametrize(
    ("per", "text"),
    [("turn", SICK), ("conversation", FIGHT), ("prompt", f"You are an adventurer.\n{FIGHT}\nI draw my sword.\n{SICK}")],
)
def test_the_text_that_decides(engine, per, text):
    one = engine_of(per=per)
    found = routed(one, TALK)
    vectors = [[embedded(one, example, 1) for example in texts] for texts in EXAMPLES.values()]
    torch.testing.assert_close(found, by_hand(vectors, embedded(one, text, 1), 0.1), rtol=1e-3, atol=1e-4)


def test_a_single_message_is_routed_as_the_conversation_that_it_opens():
    recipe = demo(per="prompt").model_copy(update={"chat": demo().chat.with_(system="The road is long.")})
    engine = lmoe_cli.load(recipe, device="cpu", dtype="float32")
    alone = routed(engine, SICK)
    spelled = routed(engine, [{"role": "system", "content": "The road is long."}, {"role": "user", "content": SICK}])
    assert torch.equal(alone, spelled)
    assert not torch.equal(alone, routed(engine, [{"role": "user", "content": SICK}]))


# -- cached keys and values


def test_another_blend_in_the_next_turn_gives_the_answer_of_a_fresh_session():
    engine = engine_of()
    values = engine.key_values()
    list(engine.stream(TALK[:2], engine.sampling.with_(max_new_tokens=3, temperature=0), values))
    first = engine.blend
    engine.stream(TALK, values=values)
    assert engine.blend != first
    found = values.logits(engine.encode(TALK), engine.blend)
    assert values.reused == 0
    assert torch.equal(found, engine.key_values().logits(engine.encode(TALK), engine.blend))


def test_answers_by_turns_are_each_computed_under_what_was_routed_for_them():
    engine = engine_of()
    short = engine.sampling.with_(max_new_tokens=6, temperature=0)
    alone = [[piece.token for piece in engine.stream(prompt, short)] for prompt in (FIGHT, SICK)]
    by_turns = [engine.stream(prompt, short) for prompt in (FIGHT, SICK)]
    found = [[], []]
    for pieces in zip(*by_turns, strict=False):
        for own, piece in zip(found, pieces, strict=True):
            own.append(piece.token)
    length = len(found[0])
    assert found == [tokens[:length] for tokens in alone]
    assert length > 2


def test_keep_goes_on_with_keys_and_values_of_the_blend_before():
    engine = engine_of(on_change="keep")
    values = engine.key_values()
    list(engine.stream(TALK[:2], engine.sampling.with_(max_new_tokens=3, temperature=0), values))
    engine.stream(TALK, values=values)
    found = values.logits(engine.encode(TALK), engine.blend)
    assert values.reused > 10
    fresh = engine.key_values(keep=False).logits(engine.encode(TALK), engine.blend)
    assert not torch.allclose(found, fresh, atol=1e-2)


# -- sentence-transformers


class Counting:
    """A stand-in for a sentence-transformers model: a text is its letters, counted."""

    made = ()

    def __init__(self, name, device=None):
        if name == "no/such":
            raise OSError("no/such is not a model")
        Counting.made = (*Counting.made, (name, device))

    def encode(self, text, **words):
        return torch.tensor([float(text.count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"]).numpy()


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Counting
    module.__spec__ = types.SimpleNamespace(name="sentence_transformers")
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr(Counting, "made", ())


def test_a_model_of_sentence_transformers_embeds_in_place_of_the_base(library):
    engine = engine_of(encoder="some/model", temperature=0.4)
    assert Counting.made == (("some/model", "cpu"),)
    counted = [[torch.from_numpy(Counting("x").encode(text)) for text in texts] for texts in EXAMPLES.values()]
    expected = by_hand(counted, torch.from_numpy(Counting("x").encode(FIGHT)), 0.4)
    torch.testing.assert_close(routed(engine, FIGHT), expected, rtol=1e-5, atol=1e-6)


def test_a_model_in_a_folder_is_found_beside_the_recipe(library, tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "mix.yaml").write_text(recipe_text(demo(encoder="encoder")))
    lmoe_cli.load(tmp_path / "mix.yaml", device="cpu")
    assert Counting.made == ((str(tmp_path / "encoder"), "cpu"),)


def test_a_model_that_is_not_there_is_named(library):
    with pytest.raises(UsageError) as caught:
        engine_of(encoder="no/such")
    assert caught.value.code == "encoder-missing"
    assert "no/such" in caught.value.message


def test_without_the_library_check_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    loadout = resolve(demo(encoder="some/model"), "mix.yaml")
    (found,) = check(loadout).findings[:1]
    assert (found.code, found.hint) == ("extra-missing", "pip install 'lmoe-cli[encoder]'")
    with pytest.raises(UsageError) as caught:
        start(loadout, device="cpu")
    assert caught.value.code == "extra-missing"
    assert caught.value.hint == "pip install 'lmoe-cli[encoder]'"


# -- what check says


def codes(recipe, folder=None):
    return [
        (found.code, found.where) for found in check(resolve(recipe, "a test", beside=folder)).findings
        if found.severity == "error"
    ]  # fmt: skip


def test_an_expert_of_which_nothing_is_said_is_named_and_a_description_is_enough():
    assert codes(demo({"warrior": {"examples": ["fight"]}, "mage": {}})) == [("examples-missing", "mage")]
    assert codes(demo({"warrior": {"examples": ["fight"]}, "mage": {"examples": [" "]}})) == [
        ("examples-missing", "mage")
    ]
    assert codes(demo({"warrior": {"examples": ["fight"]}, "mage": {"description": "casts spells"}})) == []


@pytest.mark.parametrize(
    ("name", "content", "code", "line"),
    [
        ("texts.jsonl", b'{"text": "one"}\n{"text": "two"\n', "json-invalid", 2),
        ("texts.jsonl", b'{"text": "one"}\n\n{"word": "two"}\n', "data-invalid", 3),
        ("texts.jsonl", b'{"text": " "}\n', "data-invalid", 1),
        ("texts.jsonl", b'{"messages": [{"role": "assistant", "content": "hm"}]}\n', "data-invalid", 1),
        ("texts.txt", b"one\ntwo\n\xff\xfe\n", "data-invalid", 3),
        ("texts.txt", b"x" * ((1 << 20) + 1), "data-invalid", 1),
    ],
)
def test_a_damaged_line_is_found_by_check_and_told_with_its_number(tmp_path, name, content, code, line):
    (tmp_path / name).write_bytes(content)
    recipe = demo({"mage": {"data": name}, "healer": {"examples": ["a wound"]}})
    assert codes(recipe, tmp_path) == [(code, "mage")]
    (found,) = [one for one in check(resolve(recipe, "x", beside=tmp_path)).findings if one.severity == "error"]
    assert f"{tmp_path / name}:{line}" in found.message
    (tmp_path / "mix.yaml").write_text(recipe_text(recipe))
    with pytest.raises(RefusedError):
        lmoe_cli.load(tmp_path / "mix.yaml")


def test_a_data_file_that_is_not_there_is_found_by_check(tmp_path):
    assert codes(demo({"mage": {"data": "none.jsonl"}}), tmp_path) == [("not-found", "mage")]
    (tmp_path / "folder").mkdir()
    assert codes(demo({"mage": {"data": "folder"}}), tmp_path) == [("not-a-file", "mage")]
    (tmp_path / "empty.txt").write_bytes(b"\n\n")
    assert codes(demo({"mage": {"data": "empty.txt"}}), tmp_path) == [("examples-missing", "mage")]


def test_a_file_gives_what_users_say_after_the_examples_and_is_read_no_further_than_needed(tmp_path):
    talk = '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "first"}]}\n'
    (tmp_path / "a.jsonl").write_text(talk + '{"text": "second"}\n' + '{"text": "more"}\n' * MOST + "{damaged")
    (tmp_path / "b.txt").write_text("\ufeffone\n\n  two  \n", encoding="utf-8")
    recipe = demo({"mage": {"examples": ["own"], "data": "a.jsonl"}, "healer": {"data": "b.txt"}})
    mage, healer = resolve(recipe, "a test", beside=tmp_path).experts
    assert texts_of(mage, tmp_path)[:3] == ["own", "first", "second"]
    assert len(texts_of(mage, tmp_path)) == 1 + MOST
    assert texts_of(healer, tmp_path) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.ndjson", "A.JSONL"])
def test_lines_of_json_are_read_as_such_however_their_file_is_called_and_held_out_ones_not(tmp_path, name):
    held_out = [f'{{"text": "two", "split": "{word}"}}' for word in ("valid", "validation", " Dev", "test")]
    lines = ('{"text": "one", "split": "training"}', *held_out, '{"text": "three"}')
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    (mage,) = resolve(demo({"mage": {"data": name}}), "a test", beside=tmp_path).experts
    assert texts_of(mage, tmp_path) == ["one", "three"]


def test_a_block_that_the_base_has_not_is_found_by_check_and_told_when_it_runs():
    loadout = resolve(demo(layer=4), "mix.yaml")
    found = [(item.code, item.hint) for item in check(loadout).findings if item.severity == "error"]
    assert found == [("layer-missing", "'layer' is from 0 to 3")]
    with pytest.raises(UsageError) as caught:
        start(loadout, device="cpu")
    assert (caught.value.code, caught.value.hint) == found[0]


def test_a_base_without_a_tokenizer_embeds_nothing_unless_another_model_does(tmp_path, library):
    own = case("llama", "lora")
    entry = {"adapter": str(own.one), "examples": ["x"]}
    recipe = {"base": str(own.base), "experts": {"one": entry}, "router": {"type": "encoder"}}
    assert codes(Recipe.model_validate(recipe)) == [("encoder-tokenizer", str(own.base))]
    recipe["router"] = {"type": "encoder", "encoder": "some/model"}
    assert codes(Recipe.model_validate(recipe)) == []
    tiny.save_base("llama", tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    recipe = {"base": str(tmp_path / "base"), "experts": {"one": entry}, "router": {"type": "encoder"}}
    assert codes(Recipe.model_validate(recipe)) == []


# -- a recipe that moves


def test_a_recipe_that_is_saved_elsewhere_names_the_same_texts(tmp_path, library):
    (tmp_path / "one" / "encoder").mkdir(parents=True)
    (tmp_path / "one" / "texts.txt").write_text("cast a spell\n")
    recipe = demo({"mage": {"data": "texts.txt"}}, encoder="encoder")
    (tmp_path / "one" / "mix.yaml").write_text(recipe_text(recipe))
    loadout = resolve(read_recipe(tmp_path / "one" / "mix.yaml"), "mix.yaml", beside=tmp_path / "one")
    for folder, written in ((tmp_path / "two", str(tmp_path / "one" / "texts.txt")), (tmp_path, "./one/texts.txt")):
        folder.mkdir(exist_ok=True)
        elsewhere = moved(loadout, folder)
        assert elsewhere.experts["mage"].data == written
        assert elsewhere.router.encoder == written.replace("texts.txt", "encoder")
        again = resolve(elsewhere, "again", beside=folder)
        assert texts_of(again.experts[0], folder) == ["cast a spell"]
    assert moved(loadout, tmp_path / "one").experts["mage"].data == "./texts.txt"


def test_checking_texts_imports_nothing_heavy(tmp_path):
    (tmp_path / "mix.yaml").write_text(recipe_text(demo(encoder="some/model")))
    script = (
        "import sys, contextlib\nfrom lmoe_cli.cli.root import run\n"
        f"with contextlib.redirect_stdout(None):\n    run(['check', {str(tmp_path / 'mix.yaml')!r}, '--json'])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'sentence_transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

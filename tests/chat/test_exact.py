"""What a turned weight does to an answer: exactly what a fresh session under the new weights would give."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from chat.fakes import refuse
from lmoe_cli.bake.model import bake_model
from lmoe_cli.chat.events import Answer, Heading
from lmoe_cli.chat.session import Exchange, Outside, Session
from lmoe_cli.engine.build import load, start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.loadout.recipe import Recipe

BEFORE = {"warrior": 1.0, "mage": 0.0, "healer": 0.3}
AFTER = {"warrior": -0.5, "mage": 1.5, "healer": 0.0}


@pytest.fixture(scope="module")
def engine(tinymage):
    return load(tinymage, device="cpu")


@pytest.fixture
def talk(engine):
    engine.set_weights(BEFORE)
    return Session(engine, Outside(refuse, refuse))


def said(talk, text):
    *_, told = talk.answer(text)
    assert isinstance(told, Answer)
    return told.text


def fresh(engine, exchanges, text, weights=AFTER):
    """What a session that never knew other weights answers."""
    engine.set_weights(weights)
    talk = Session(engine, Outside(refuse, refuse))
    talk.exchanges = list(exchanges)
    return said(talk, text)


def continued(engine, tokens, count):
    """The most likely continuation, computed from nothing for every token."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(engine.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-count:]


def test_after_a_change_the_answer_is_that_of_a_fresh_session(talk, engine):
    first = said(talk, "Who are you?")
    unchanged = fresh(engine, [Exchange("Who are you?", first)], "And then?", BEFORE)
    talk.mixer.turn(AFTER)
    second = said(talk, "And then?")
    assert second == fresh(engine, [Exchange("Who are you?", first)], "And then?")
    assert second != unchanged


def test_kept_keys_and_values_give_another_answer(talk, engine):
    talk.set("on_change", "keep")
    first = said(talk, "Who are you?")
    talk.mixer.turn(AFTER)
    second = said(talk, "And then?")
    assert second != fresh(engine, [Exchange("Who are you?", first)], "And then?")
    engine.set_weights(BEFORE)
    talk.set("on_change", "recompute")
    assert said(talk, "Go on.") == fresh(engine, talk.exchanges[:2], "Go on.", BEFORE)


@pytest.mark.parametrize("turned_after", [1, 4, 9])
@pytest.mark.parametrize("on_change", ["recompute", "keep"])
def test_turned_in_the_middle_of_an_answer_the_rest_is_that_of_the_new_weights(talk, engine, on_change, turned_after):
    talk.set("on_change", on_change)
    events = talk.answer("Who are you?")
    for _ in range(turned_after):
        next(events)
    generation = talk.generation
    start = generation.prompt + generation.new
    talk.mixer.turn(AFTER)
    list(events)
    rest = (generation.prompt + generation.new)[len(start) :]
    assert len(rest) == 12 - turned_after
    assert (rest == continued(engine, start, len(rest))) is (on_change == "recompute")


def test_a_turn_from_another_thread_never_falls_into_the_middle_of_a_token(talk, engine, monkeypatch):
    seen = []
    plain = type(talk.values).logits

    def watched(values, tokens, blend):
        before = engine.bank.gates.values.clone()
        logits = plain(values, tokens, blend)
        assert torch.equal(before, engine.bank.gates.values)
        seen.append((list(tokens), before.flatten().tolist(), logits))
        return logits

    monkeypatch.setattr(type(talk.values), "logits", watched)
    over = threading.Event()

    def turn():
        for weights in itertools.cycle((BEFORE, AFTER)):
            engine.set_weights(weights)
            if over.is_set():
                return

    turner = threading.Thread(target=turn)
    turner.start()
    try:
        talk.set("max_new_tokens", 60)
        said(talk, "Who are you?")
    finally:
        over.set()
        turner.join()
    assert engine.bank.gates.values.flatten().tolist() == pytest.approx(list(engine.weights.values()))
    blends = {tuple(gates) for _, gates, _ in seen}
    assert len(blends) == 2
    for tokens, gates, logits in seen:
        engine.set_weights(dict(zip(engine.weights, gates, strict=True)))
        torch.testing.assert_close(logits, engine.logits(torch.tensor([tokens]))[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["tinymage.yaml", "static.yaml"])
def test_a_comparison_asks_the_blend_and_the_bare_base(tinymage, recipe):
    engine = load(tinymage.parent / recipe, device="cpu")
    bare = load(Recipe(base=str(tinymage.parent / "base"), experts={}, chat=engine.loadout.recipe.chat), device="cpu")
    talk = Session(engine, Outside(refuse, refuse))
    events = list(talk.compare("Who are you?"))
    blend, base = (event.text for event in events if isinstance(event, Answer))
    assert [event.text for event in events if isinstance(event, Heading)][1] == "base"
    assert base == bare.generate("Who are you?")
    assert blend == engine.generate("Who are you?") == said(talk, "Who are you?")
    assert blend != base
    assert engine.is_folded == (recipe == "static.yaml")


def test_a_saved_recipe_answers_as_the_session_did_wherever_it_lies(talk, engine, tmp_path):
    engine.set_weights({"warrior": 0.25, "mage": -1.5, "healer": 0.0})
    expected = said(talk, "Who are you?")
    for place in (tmp_path / "elsewhere" / "my.yaml", tmp_path / "my.yaml"):
        talk.save(place)
        assert load(place, device="cpu").generate("Who are you?") == expected


@pytest.mark.parametrize("router", ["weighted", "encoder"])
def test_what_a_change_of_weights_does_to_the_cache_is_saved(tinymage, tmp_path, router):
    told = read_recipe(tinymage).model_dump(exclude_none=True, exclude_defaults=True)
    told["router"] = {"type": router}
    for name, entry in told["experts"].items():
        entry["description"] = f"the {name}"
    talk = Session(start(resolve(Recipe(**told), "a test", beside=tinymage.parent)), Outside(refuse, refuse))
    for number, value in enumerate(("keep", "recompute")):
        talk.set("on_change", value)
        talk.save(place := tmp_path / f"{number}.yaml")
        assert read_recipe(place).router.on_change == value


def test_what_is_baked_answers_as_the_session_did(tinymage, tmp_path):
    engine = load(tinymage, device="cpu")
    folder = tmp_path / "out"

    def bake(loadout, out, advance, force):
        bake_model(loadout, out, advance=advance, force=force)
        return "done"

    talk = Session(engine, Outside(refuse, bake))
    talk.mixer.turn({"warrior": 1.0, "mage": 0.5, "healer": -0.25})
    assert talk.bake(folder) == "done"
    bare = load(Recipe(base=str(folder), experts={}, chat=engine.loadout.recipe.chat), device="cpu")
    assert bare.generate("Who are you?") == said(talk, "Who are you?")


def test_a_bake_that_is_stopped_leaves_nothing(tinymage, tmp_path):
    talk = Session(
        load(tinymage, device="cpu"),
        Outside(refuse, lambda *arguments: bake_model(*arguments[:2], advance=arguments[2])),
    )
    talk.stop()
    with pytest.raises(Exception, match="stopped"):
        talk.bake(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_longer_than_the_context_goes_on(talk):
    notes = [event for number in range(8) for event in talk.answer(f"Who are you, number {number}?")]
    assert len(talk.exchanges) < 8
    assert sum(isinstance(event, Answer) for event in notes) == 8
    assert sum("forgets" in getattr(event, "text", "") for event in notes) == 1

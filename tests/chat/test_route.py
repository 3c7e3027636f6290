"""`/route on`: what the chat shows of an answer is what routing the whole conversation gives."""

from __future__ import annotations

import pytest
import torch

from chat.fakes import refuse
from chat.test_repl import chatting
from lmoe_cli.chat.commands import handle
from lmoe_cli.chat.complete import completions
from lmoe_cli.chat.events import Answer, Letters, Note, Text
from lmoe_cli.chat.painter import Painter
from lmoe_cli.chat.session import Outside, Session
from lmoe_cli.engine.build import load
from lmoe_cli.engine.trace import trace
from lmoe_cli.findings import Finding

NAMES = ("warrior", "mage", "healer")


@pytest.fixture(scope="module")
def engine(tinymage):
    recipe = tinymage.with_name("arrow.yaml")
    text = tinymage.read_text()
    recipe.write_text(text.replace("chat:", "router: {type: arrow, top_k: 1, temperature: 0.5}\nchat:"))
    return load(recipe, device="cpu")


@pytest.fixture
def talk(engine):
    return Session(engine, Outside(refuse, refuse))


def shown(talk, line):
    events = list(handle(talk, line))
    return [event for event in events if isinstance(event, Text)], events[-1], events


def by_hand(engine, tokens, count):
    """Shares in each of the last tokens, by one pass over all of them."""
    gates = trace(engine, tokens).gates.mean(0)[-count:].abs()
    return gates / gates.sum(-1, keepdim=True).clamp(min=1)


def test_each_piece_has_the_expert_with_most_say_and_the_answer_the_mean(talk, engine):
    list(handle(talk, "/route on"))
    for message in ("Who are you?", "And then?"):
        before = talk._messages(message, talk.exchanges)
        pieces, answer, _ = shown(talk, message)
        prompt = engine.encode(before)
        tokens = talk.generation.prompt + talk.generation.new
        assert tokens[: len(prompt)] == prompt
        count = len(tokens) - len(prompt)
        assert count == answer.timings.new_tokens == len(pieces)
        shares = by_hand(engine, tokens, count)
        for piece, row in zip(pieces, shares, strict=True):
            best = NAMES[int(row.argmax())]
            assert piece.expert == (best if float(row.max()) >= 1 - float(row.sum()) else None)
        torch.testing.assert_close(torch.tensor(list(answer.shares.values())), shares.mean(0), rtol=1e-3, atol=1e-4)
        assert "".join(piece.text for piece in pieces) == answer.text


def test_the_answer_is_the_same_as_when_nothing_is_shown_and_nothing_is_watched_then(talk, engine):
    plain, answer, events = shown(talk, "Who are you?")
    assert answer.shares is None
    assert not [event for event in events if isinstance(event, Letters)]
    assert {piece.expert for piece in plain} == {None}
    assert {place.gates.watch for place in engine.router.places.values()} == {None}
    talk.clear()
    list(handle(talk, "/route on"))
    pieces, routed, _ = shown(talk, "Who are you?")
    assert [piece.text for piece in pieces] == [piece.text for piece in plain]
    assert routed.text == answer.text
    assert {place.gates.watch for place in engine.router.places.values()} == {None}


def test_the_letters_are_told_once(talk):
    list(handle(talk, "/route on"))
    assert Letters(NAMES) in shown(talk, "Who are you?")[2]
    assert Letters(NAMES) not in shown(talk, "And then?")[2]


def test_an_answer_that_is_stopped_is_shown_whole(talk):
    list(handle(talk, "/route on"))
    text, answer = "", None
    for event in handle(talk, "Who are you?"):
        if isinstance(event, Text):
            text += event.text
            if len(text) >= 3:
                talk.stop()
        if isinstance(event, Answer):
            answer = event
    talk.go_on()
    assert answer.finish == "interrupted"
    assert text == answer.text
    assert len(text) < 12


def test_off_shows_nothing_again(talk):
    assert list(handle(talk, "/route"))[-1] == Note("what the router chooses is not shown")
    list(handle(talk, "/route on"))
    assert "each token" in list(handle(talk, "/route"))[-1].text
    list(handle(talk, "/route off"))
    assert shown(talk, "Who are you?")[1].shares is None
    wrong = list(handle(talk, "/route maybe"))[-1]
    assert isinstance(wrong, Finding)
    assert wrong.hint == "/route on"


def test_on_and_off_are_offered(talk):
    assert completions(talk, "/route o") == ["on", "off"]


def test_muted_experts_have_no_say(talk, engine):
    list(handle(talk, "/route on"))
    before = engine.weights
    talk.mixer.base()
    try:
        pieces, answer, _ = shown(talk, "Who are you?")
    finally:
        engine.set_weights(before)
    assert {piece.expert for piece in pieces} == {None}
    assert answer.shares == dict.fromkeys(NAMES, 0.0)


def test_ab_shows_the_blend_and_not_the_base(talk):
    list(handle(talk, "/route on"))
    events = list(handle(talk, "/ab Who are you?"))
    blend, base = (event for event in events if isinstance(event, Answer))
    assert blend.shares is not None
    assert base.shares is None


def test_an_encoder_shows_the_blend_of_the_prompt(tinymage):
    recipe = tinymage.with_name("encoder.yaml")
    text = tinymage.read_text()
    for name in NAMES:
        text = text.replace(f"adapter: ./{name}", f"adapter: ./{name}\n    description: the {name}")
    text = text.replace(
        "{adapter: ./warrior\n    description: the warrior,", "{adapter: ./warrior, description: the warrior,"
    )
    text = text.replace(
        "{adapter: ./healer\n    description: the healer,", "{adapter: ./healer, description: the healer,"
    )
    recipe.write_text(text.replace("chat:", "router: {type: encoder}\nchat:"))
    talk = Session(load(recipe, device="cpu"), Outside(refuse, refuse))
    list(handle(talk, "/route on"))
    told = []
    for message in ("the mage", "the warrior"):
        pieces, answer, _ = shown(talk, message)
        assert {piece.expert for piece in pieces} == {None}
        gates = talk.engine.bank.gates.values[0].abs()
        expected = gates / gates.sum().clamp(min=1)
        assert list(answer.shares.values()) == pytest.approx(expected.tolist(), abs=1e-6)
        told.append(answer.shares)
    assert told[0] != told[1]


# -- the terminal


def test_colours_are_brackets_where_there_are_none():
    said = [Text("I", "mage"), Text(" put", "mage"), Text(" my", "warrior"), Text(" axe"), Text(".", "mage")]
    plain = Painter(lambda: NAMES, is_coloured=False)
    text = "".join(part for event in said for part, _ in plain.add(event)) + plain.end()
    assert text == "M[I put] W[my] axeM[.]"
    coloured = Painter(lambda: NAMES, is_coloured=True)
    assert [part for event in said for part in coloured.add(event)] == [
        ("I", "magenta"), (" put", "magenta"), (" my", "cyan"), (" axe", ""), (".", "magenta"),
    ]  # fmt: skip


@pytest.mark.parametrize("colours", [True, False])
def test_the_terminal_shows_who_said_what_and_a_bar(tmp_path, engine, monkeypatch, colours):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR" if colours else "NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    engine.pace = None
    with chatting(tmp_path, engine) as user:
        user.types("/route on\r")
        user.sees("after each answer, all shares")
        user.types("Who are you?\r")
        user.sees("tok/s")
        (answer,) = user.repl.session.answers
        assert "W warrior   M mage   H healer\n" in user.screen
        told = "  ".join(f"{name[0].upper()} {name} {share:.0%}" for name, share in answer.shares.items())
        assert told in user.screen
        if colours:
            assert answer.text.splitlines()[0] in user.screen
            assert "\x1b[3" in user._recorder.printed
        else:
            assert "[" in user.screen.partition("H healer\n")[2]
            assert not [code for code in ("36m", "35m", "33m") if f"\x1b[{code}" in user._recorder.printed]

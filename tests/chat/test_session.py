from __future__ import annotations

import weakref
from pathlib import Path

import pytest

from chat.fakes import FakeEngine, session
from lmoe_cli.chat.events import Answer, Heading, Note, Text
from lmoe_cli.chat.session import Exchange
from lmoe_cli.errors import ResourceError, UsageError

SPOKEN = "I draw my sword."


def texts(events):
    return "".join(event.text for event in events if isinstance(event, Text))


def test_an_answer_comes_in_pieces_and_ends_with_what_it_took():
    *pieces, told = session().answer("Hello")
    assert [piece.text for piece in pieces] == ["I", " draw", " my", " sword", "."]
    assert isinstance(told, Answer)
    assert (told.text, told.finish) == (SPOKEN, "stop")
    assert told.weights == {"warrior": 0.6, "mage": 0.3, "healer": 0.1}


def test_the_conversation_is_sent_with_every_message():
    talk = session()
    list(talk.answer("Hello"))
    talk.set("system", "Be brave.")
    list(talk.answer("And then?"))
    assert talk.engine.asked == [["Hello"], ["Be brave.", "Hello", SPOKEN, "And then?"]]


def test_an_answer_that_is_stopped_keeps_the_part_that_came():
    talk = session()
    events = talk.answer("Hello")
    assert next(events).text == "I"
    talk.stop()
    (told,) = events
    assert (told.text, told.finish) == ("I", "interrupted")
    assert talk.exchanges == [Exchange("Hello", "I")]


def test_a_stop_that_was_taken_back_stops_nothing():
    talk = session()
    talk.stop()
    talk.go_on()
    assert texts(talk.answer("Hello")) == SPOKEN


def test_undo_forgets_the_last_exchange():
    talk = session()
    list(talk.answer("one"))
    list(talk.answer("two"))
    assert talk.undo().user == "two"
    list(talk.answer("three"))
    assert talk.engine.asked[-1] == ["one", SPOKEN, "three"]


def test_retry_answers_the_last_message_again():
    talk = session()
    list(talk.answer("one"))
    list(talk.answer("two"))
    talk.engine.words = ["Again"]
    list(talk.retry())
    assert talk.engine.asked[-1] == ["one", SPOKEN, "two"]
    assert talk.exchanges == [Exchange("one", SPOKEN), Exchange("two", "Again")]


def test_nothing_said_is_nothing_to_undo_or_retry():
    talk = session()
    for act in (talk.undo, lambda: list(talk.retry())):
        with pytest.raises(UsageError) as refused:
            act()
        assert refused.value.code == "nothing-said"


def test_an_error_leaves_the_conversation_as_it_was():
    talk = session(FakeEngine(context=8))
    list(talk.answer("one"))
    before = list(talk.exchanges)
    with pytest.raises(UsageError) as refused:
        list(talk.answer("a b c d e f g h i j"))
    assert refused.value.code == "context-full"
    assert talk.exchanges == before


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full_and_that_is_said_once():
    talk = session(FakeEngine(context=24))
    talk.set("max_new_tokens", 10)
    notes = [
        [event.text for event in talk.answer(f"message {number}") if isinstance(event, Note)] for number in range(6)
    ]
    assert [len(found) for found in notes] == [0, 0, 0, 1, 0, 0]
    assert "24 tokens" in notes[3][0]
    assert talk.engine.asked[-1] == ["message 3", SPOKEN, "message 4", SPOKEN, "message 5"]
    assert all(len(" ".join(asked).split()) + 10 <= 24 for asked in talk.engine.asked)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_an_answer_without_memory_is_told_and_the_session_goes_on(error):
    class Scarce:
        def __iter__(self):
            raise error

    talk = session()
    plain, talk.engine.stream = talk.engine.stream, lambda *_: Scarce()
    with pytest.raises(ResourceError) as told:
        list(talk.answer("one"))
    assert told.value.code == "out-of-memory"
    talk.engine.stream = plain
    assert texts(talk.answer("two")) == SPOKEN
    assert talk.engine.asked == [["two"]]


def test_compare_answers_under_the_blend_and_the_base_with_one_seed_and_keeps_neither():
    talk = session()
    list(talk.answer("one"))
    events = list(talk.compare("two"))
    assert [event.text for event in events if isinstance(event, Heading)] == [
        "blend: warrior 0.60 mage 0.30 healer 0.10",
        "base",
    ]
    assert [event.text for event in events if isinstance(event, Answer)] == [SPOKEN, "base"]
    assert talk.engine.asked[-1] == talk.engine.asked[-2] == ["one", SPOKEN, "two"]
    assert len(talk.exchanges) == 1
    assert not talk.engine.is_base


def test_a_comparison_that_is_stopped_leaves_the_experts_on_the_base():
    talk = session()
    events = talk.compare("two")
    while next(events) != Heading("base"):
        pass
    next(events)
    talk.stop()
    *_, told = events
    assert told.finish == "stop"  # the base's one word was its last
    assert not talk.engine.is_base


def test_weights_turned_while_an_answer_comes_act_on_its_next_token():
    talk = session()
    events = talk.answer("Hello")
    next(events)
    next(events)
    talk.mixer.nudge(+2)
    list(events)
    assert [weights["warrior"] for weights in talk.engine.turned] == [0.6, 0.6, 0.7, 0.7, 0.7]


def test_settings_are_those_of_recipes():
    talk = session()
    talk.set("temperature", 0)
    talk.set("stop", "END")
    assert talk.settings["temperature"] == 0
    assert talk.settings["stop"] == ["END"]
    for key, value, code in [
        ("temperature", -1, "setting-invalid"),
        ("top_p", "half", "setting-invalid"),
        ("temprature", 1, "setting-unknown"),
        ("on_change", "forget", "setting-invalid"),
    ]:
        with pytest.raises(UsageError) as refused:
            talk.set(key, value)
        assert refused.value.code == code
    assert talk.settings["temperature"] == 0


def test_what_a_change_of_weights_does_to_the_cache_can_be_chosen():
    talk = session()
    assert talk.settings["on_change"] == "recompute"
    talk.set("on_change", "keep")
    assert talk.values.keep


def test_clear_starts_over():
    talk = session()
    list(talk.answer("one"))
    talk.clear()
    list(talk.answer("two"))
    assert talk.engine.asked[-1] == ["two"]


def test_another_loadout_takes_the_conversation_over():
    other = FakeEngine("Heal !", weights={"cleric": 1.0})
    talk = session(load=lambda path: (other, []))
    list(talk.answer("one"))
    talk.load("other.yaml")
    assert texts(talk.answer("two")) == "Heal !"
    assert other.asked == [["one", SPOKEN, "two"]]
    assert talk.mixer.names == ("cleric",)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_no_room_for_another_loadout_leaves_the_old_one(error):
    def load(path):
        raise error

    talk = session(load=load)
    with pytest.raises(ResourceError, match=r"other\.yaml"):
        talk.load(Path("other.yaml"))
    assert texts(talk.answer("one")) == SPOKEN


def test_nothing_of_the_loadout_before_is_held():
    talk = session(load=lambda path: (FakeEngine("Heal !"), []))
    list(talk.answer("one"))
    held = weakref.ref(talk.engine)
    talk.load("other.yaml")
    assert held() is None


def test_no_room_to_route_a_prompt_is_told_and_forgets_nothing_that_was_said(monkeypatch):
    talk = session()
    list(talk.answer("one"))

    def stream(*_):
        raise MemoryError

    monkeypatch.setattr(talk.engine, "stream", stream)
    with pytest.raises(ResourceError):
        list(talk.answer("two"))
    assert [exchange.user for exchange in talk.exchanges] == ["one"]


def test_a_loadout_that_is_refused_leaves_the_old_one():
    def load(path):
        raise UsageError("usage", "no")

    talk = session(load=load)
    with pytest.raises(UsageError):
        talk.load("other.yaml")
    assert texts(talk.answer("one")) == SPOKEN

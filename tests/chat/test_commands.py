from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.fakes import FakeEngine, session
from lmoe_cli.chat.commands import COMMANDS, acts_at_once, handle
from lmoe_cli.chat.complete import completions
from lmoe_cli.chat.events import Answer, Facts, Leave, Note
from lmoe_cli.chat.quoted import is_open, message
from lmoe_cli.findings import Finding, RefusedError, finding


def told(talk, line):
    """The last event of a line."""
    return list(handle(talk, line))[-1]


def test_w_turns_weights_and_tells_them():
    talk = session()
    assert told(talk, "/w mage=0.7 healer=-0.25") == Note("warrior 0.60 mage 0.70 healer -0.25")
    assert talk.engine.weights == {"warrior": 0.6, "mage": 0.7, "healer": -0.25}


def test_w_shows_what_is_muted():
    talk = session()
    told(talk, "/mute mage")
    assert told(talk, "/w") == Facts(
        "weights", (("warrior", "0.60"), ("mage", "0.00  muted, was 0.30"), ("healer", "0.10"))
    )


@pytest.mark.parametrize(
    ("line", "code", "hint"),
    [
        ("/w mage", "usage", "/w mage=0.7"),
        ("/w mage=much", "weight-invalid", "/w mage=0.7"),
        ("/w mage=nan", "weight-invalid", "a number such as 0.3"),
        ("/w mge=1", "expert-unknown", "did you mean 'mage'?"),
        ("/solo mge", "expert-unknown", "did you mean 'mage'?"),
        ("/mute", "usage", "one of warrior, mage, healer"),
        ("/slo mage", "command-unknown", "did you mean /solo?"),
        ("/xyzzy", "command-unknown", "/help lists commands; a space in front makes it a message"),
        ("/ab", "usage", "/ab A goblin blocks the bridge."),
        ("/set temprature 1", "setting-unknown", "did you mean 'temperature'?"),
        ("/set temperature hot", "setting-invalid", ""),
        ("/retry", "nothing-said", "write something"),
        ("/undo", "nothing-said", "write something"),
        ("/save", "usage", "/save my.yaml"),
        ("/load", "usage", "/load my.yaml"),
        ("/bake", "usage", "/bake out/"),
    ],
)
def test_a_mistake_is_told_with_a_hint_and_changes_nothing(line, code, hint):
    talk = session()
    before = (talk.engine.weights, talk.settings, talk.exchanges)
    found = told(talk, line)
    assert isinstance(found, Finding)
    assert (found.code, found.hint) == (code, hint)
    assert (talk.engine.weights, talk.settings, talk.exchanges) == before


def test_all_findings_of_a_refused_recipe_are_told():
    refused = [finding("base-mismatch", "a", "one"), finding("no-op", "b", "two")]

    def load(path):
        raise RefusedError("no", refused)

    assert list(handle(session(load=load), "/load x.yaml"))[-2:] == refused


def test_a_static_router_says_that_its_weights_do_not_turn():
    found = told(session(FakeEngine(router="static")), "/w mage=1")
    assert found.code == "weights-fixed"
    assert "weighted" in found.hint


def test_a_fixed_router_has_no_route_to_show():
    assert "same for every token" in told(session(), "/route on").text


def test_settings_are_read_as_a_recipe_reads_them():
    talk = session()
    for line, key, value in [
        ("/set temperature 0", "temperature", 0),
        ("/set top_p 1e-1", "top_p", 0.1),
        ("/set seed 7", "seed", 7),
        ("/set seed none", "seed", None),
        ("/set stop END", "stop", ["END"]),
        ('/set stop ["a", "b"]', "stop", ["a", "b"]),
        ("/set stop none", "stop", []),
        ("/set system 42", "system", "42"),
        ("/set on_change keep", "on_change", "keep"),
        ("/system Be brave: yes", "system", "Be brave: yes"),
        ("/system", "system", None),
    ]:
        assert isinstance(told(talk, line), Note), line
        assert talk.settings[key] == value, line
    assert told(talk, "/set seed") == Note("seed: none")
    assert dict(told(talk, "/set").rows)["temperature"] == "0.0"


def test_solo_mute_and_base_tell_the_weights():
    talk = session()
    assert told(talk, "/solo mage") == Note("warrior 0.00 mage 0.30 healer 0.00")
    assert told(talk, "/solo") == Note("warrior 0.60 mage 0.30 healer 0.10")
    assert "mage muted" in told(talk, "/mute mage").text
    assert "mage is back" in told(talk, "/mute mage").text
    assert "base alone" in told(talk, "/base").text
    assert told(talk, "/base") == Note("warrior 0.60 mage 0.30 healer 0.10")


def test_load_tells_warnings_and_what_answers_now():
    warning = finding("base-unconfirmed", "mage", "who knows")
    note = finding("weight-zero", "mage", "nothing")
    other = FakeEngine(weights={"cleric": 1.0}, template=False)
    events = list(handle(session(load=lambda path: (other, [warning, note])), "/load ~/x.yaml"))
    assert events[0] == Note(f"loading {Path('~/x.yaml').expanduser()} …")
    assert events[1:3] == [warning, Note("battlemage: demo:adventurer + cleric 1.00")]
    assert "continues the text" in events[3].text


def test_stats_count_all_answers():
    talk = session()
    talk.engine.model = type("Model", (), {"parameters": lambda self: iter([FakeParameter()])})()
    talk.engine.bank = type("Bank", (), {"size": 2_000_000})()
    list(handle(talk, "one"))
    list(handle(talk, "two"))
    rows = dict(told(talk, "/stats").rows)
    assert (rows["answers"], rows["tokens"], rows["speed"]) == ("2", "10", "32.0 tok/s")
    assert (rows["experts"], rows["device"]) == ("2.0 MB", "cpu float32")


class FakeParameter:
    device, dtype = "cpu", "torch.float32"


def test_a_message_that_begins_with_a_space_may_begin_with_a_slash():
    talk = session()
    assert isinstance(told(talk, " /etc/passwd is what?"), Answer)
    assert talk.exchanges[0].user == "/etc/passwd is what?"


def test_an_empty_line_does_nothing():
    assert list(handle(session(), "   ")) == []


def test_a_message_in_quotes_keeps_its_lines():
    talk = session()
    told(talk, '"""one\n  two"""')
    assert talk.exchanges[0].user == "one\n  two"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('"""', True),
        ('"""a', True),
        ('"""a\nb', True),
        ('"""a"""', False),
        ('""""""', False),
        ('"""""', True),
        ('a"""', False),
    ],
)
def test_quotes_open_and_close(line, expected):
    assert is_open(line) is expected


@given(st.text(alphabet='ab "\n', max_size=20))
def test_what_stands_between_quotes_is_the_message(text):
    if '"""' not in text and not text.endswith('"') and not text.startswith('"') and text.strip("\n") == text:
        assert message(f'"""{text}"""') == text


def test_bye_leaves():
    assert list(handle(session(), "/bye")) == [Leave()]


def test_help_lists_every_command():
    shown = [name for name, _ in told(session(), "/help").rows]
    assert all(any(line.split()[0] == name for line in shown) for name in COMMANDS)


def test_what_turns_or_shows_acts_at_once_and_what_answers_waits():
    assert all(map(acts_at_once, ["/w mage=1", "/solo", "/base", "/show", "/nonsense", "/save x"]))
    assert not any(map(acts_at_once, ["hello", "/ab hi", "/retry", "/undo", "/load x", "/bake x", "/clear", "/bye"]))


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("/so", ["/solo"]),
        ("/w ", ["warrior=", "mage=", "healer="]),
        ("/w mage=0.5 h", ["healer="]),
        ("/solo m", ["mage"]),
        ("/mute mage ", []),
        ("/set temp", ["temperature"]),
        ("/set on", ["on_change"]),
        ("/set on_change k", ["keep"]),
        ("/set temperature 0", []),
        ("/load ", None),
        ("/ab ", []),
        ("hello ma", []),
        ("/nonsense m", []),
    ],
)
def test_completion_offers_what_may_follow(before, expected):
    assert completions(session(), before) == expected

"""What strangers wrote, as it is shown to people."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmoe_cli.errors import LmoeError
from lmoe_cli.findings import finding
from lmoe_cli.readable import MAX_TEXT, readable

ORDINARY = (
    "mix.yaml:3:27: experts.mage has no key 'wieght'",
    "./base: the base's \"own\" words, and a folder's 'name' — µ ≤ 3",
    "a" * 200 + "/deep/path: no such file",
)


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_message_stays_as_it_is(text):
    assert readable(text) == text


@given(st.text(st.characters(), max_size=3000))
@example("'" + "x" * 100_000 + "'")
@example('"' * 100_000)
@example("'a " * 50_000)
@example("\x00\x1b[2J\u202e\udcff\n\r\x9b" * 1000)
def test_a_message_is_one_line_of_bounded_length_that_steers_nothing(text):
    begun = time.monotonic()
    told = readable(text)
    assert len(told) <= MAX_TEXT
    assert told.isprintable()
    assert readable(told) == told
    assert time.monotonic() - begun < 5


def test_a_long_value_keeps_its_beginning_and_end_and_what_is_said_of_it():
    told = readable(f"name: at most 100 characters, got '{'a' * 50_000}{'z' * 50_000}'; shorten it")
    assert told.startswith("name: at most 100 characters, got 'aaaa")
    assert told.endswith("zzzz'; shorten it")
    assert len(told) < 140


def test_errors_and_findings_are_readable_wherever_they_are_shown():
    error = LmoeError("bug", "x" * 10**6 + "\n", hint="\x1b[2J")
    item = finding("no-op", "y" * 10**6, "x" * 10**6 + "\n", "\x1b[2J")
    for text in (str(error), error.message, error.hint, item.where, item.message, item.hint):
        assert len(text) <= MAX_TEXT
        assert text.isprintable()

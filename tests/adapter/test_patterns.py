"""Patterns mean what PEFT makes of them, and cannot be made to run for ever."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pace import within

from lmoe_cli.adapter.patterns import Patterns
from lmoe_cli.errors import InvalidFileError

PARTS = ["model", "layers", "0", "1", "10", "self_attn", "q_proj", "mlp", "down-proj", "experts", "k"]
SIGNS = [
    ".", r"\.", ".*", ".+", "[01]", r"\d+", "(0|1)", "^", "$", "?", "*", "+", "_", "q.proj", "|", "(", ")", "[", "{2}",
    "{1,2}", r"\w+", "(?:mlp)", "(?=q)", r"\b", "{", "{e}", "(?i)", "\n",
]  # fmt: skip
modules = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)
expressions = st.lists(st.sampled_from(PARTS + SIGNS), min_size=1, max_size=6).map("".join)
patterns = st.lists(st.one_of(modules, expressions), min_size=1, max_size=4, unique=True)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(patterns, modules)
def test_the_first_match_is_that_of_peft(keys, module):
    from peft.utils.other import get_pattern_key

    values = {key: number for number, key in enumerate(keys)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = values.get(get_pattern_key(values, module), -1)
            for key in keys:
                re.compile(rf"(.*\.)?({key})$")
        except re.error:
            theirs = None
        try:
            ours = Patterns(values, "here").value(module, -1)
        except InvalidFileError:
            assert theirs is None or any("{" in key for key in keys)
        else:
            assert ours == theirs


def test_plain_names_match_from_a_dot_on_and_a_caret_asks_for_the_whole_name():
    found = Patterns({"proj": 1, "^layers.0.q_proj": 2, "0.q_proj": 3, "^q_proj": 4}, "here")
    assert [found.value(name, 0) for name in ("layers.0.q_proj", "model.layers.0.q_proj", "q_proj", "a.proj")] == [
        2,
        3,
        4,
        1,
    ]


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("(a+)+b", "a" * 40),
        ("(.*)*x", "layers." * 20),
        (r"(?:\w+\.?)+\d$!", "model.layers.0.self_attn.q_proj." * 3),
        ("(?:.*.*.*.*.*.*.*.*)*x", "y" * 200),
        ("(a|aa)+$b", "a" * 60),
        ("a{1000000000}", "a"),
        ("((a{100}){100}){100}", "a"),
        ("(a{1000}){10000}", "a"),
        ("(" * 900 + ")" * 90, "a"),
        ("[a-z]*" * 170, "a" * 200 + "!"),
        ("x" * 5000 + "*", "a"),
        ("(?R)", "a"),
        ("(?:abc){e}", "a"),
        ("[", "a"),
        ("(?P<n>a", "a"),
        ("*a", "a"),
    ],
)
def test_an_expression_that_could_run_for_ever_is_cut_off_or_quick(pattern, module, monkeypatch):
    monkeypatch.setattr("lmoe_cli.adapter.patterns.ONE_MATCH_S", 0.1)
    with within(300):
        try:
            Patterns({pattern: 1}, "acme/lora").value(module, 0)
        except InvalidFileError as error:
            assert error.code == "config-invalid"
            assert "acme/lora" in error.message
            assert len(error.message) < 300


def test_many_slow_expressions_share_one_allowance(monkeypatch):
    monkeypatch.setattr("lmoe_cli.adapter.patterns.ALL_MATCHES_S", 0.2)
    slow = {f"(?:[a-z_]+[.0-9]*)*{number}!": number for number in range(1000)}
    found = Patterns(slow, "here")
    with within(300), pytest.raises(InvalidFileError, match="take"):
        [found.value(f"model.layers.{number}.q", 0) for number in range(10_000)]


def test_a_pattern_for_each_of_many_modules_is_quick():
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(48) for expert in range(128)]
    found = Patterns({name: number for number, name in enumerate(names)}, "here")
    with within(300):
        assert [found.value(name, -1) for name in names] == list(range(len(names)))

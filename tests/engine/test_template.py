"""A chat template is tried within limits before it runs for good."""

from __future__ import annotations

import time

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lmoe_cli.engine import template
from lmoe_cli.engine.prompt import prompt_tokens
from lmoe_cli.engine.template import try_template
from lmoe_cli.errors import UsageError

SAID = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
USUAL = """\
{%- if messages[0]['role'] == 'system' %}{{ '<|system|>\\n' + messages[0]['content'] + '<|end|>\\n' }}{% endif %}
{%- set ns = namespace(tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
  {%- if message.role == "user" and not(message.content.startswith('<tool>')) %}
    {%- set ns.last = loop.index0 %}{% break %}
  {%- endif %}
{%- endfor %}
{% generation %}{{ bos_token }}{{ messages | tojson }}{% endgeneration %}
{%- for message in messages %}
  {{- loop.index ~ ': ' ~ message['content'] | trim | upper }}
  {%- if loop.index > 5 %}{{ raise_exception('too long') }}{% endif %}
{% endfor %}{{ '%s and %d' % ('text', 3) }} {{ 'x'.ljust(4) }}{{ 'y' * 3 }}{{ strftime_now('%Y') }}"""
DOUBLING = "{% set ns = namespace(s=START) %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"


def test_what_is_tried_is_what_transformers_renders(monkeypatch):
    parts = []
    compile_ = template._Guarded.from_string

    def listened_to(environment, source):
        made = compile_(environment, source)
        generate = made.generate
        made.generate = lambda **words: (parts.append(part) or part for part in generate(**words))
        return made

    monkeypatch.setattr(template._Guarded, "from_string", listened_to)
    try_template(USUAL, SAID, {"bos_token": "<s>"})
    theirs, _ = render_jinja_template([SAID], chat_template=USUAL, add_generation_prompt=True, bos_token="<s>")
    assert "".join(parts) == theirs[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ 2 ** (10 ** 10) }}",
        DOUBLING.replace("START", "'xxxx'"),
        DOUBLING.replace("START", "[1]").replace("~", "+"),
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ range(999999999) | list }}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    ],
)
def test_a_template_that_would_fill_the_memory_is_stopped_at_once(source):
    began = time.monotonic()
    with pytest.raises((TemplateError, OverflowError)):
        try_template(source, SAID, {})
    assert time.monotonic() - began < 20


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(template, "MAX_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="longer than"):
        try_template(endless, SAID, {})


class Tokenizer:
    """As much of a tokenizer as a template meets."""

    def __init__(self, source):
        self.special_tokens_map = {"eos_token": "</s>"}
        self.chat_template = source

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(self, messages, **_):
        raise AssertionError("must not be reached")


@pytest.mark.parametrize(
    "source",
    ["{{ 1/0 }}", "{{ messages + 1 }}", "{{ 3() }}", "{% include 'x' %}", "{% break %}", 7, True, {"a": "b"},
     "{{ ['a', 1] | sort }}", "{{ '\\ud800'.encode() }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
     "{{ " + "(" * 5000],
)  # fmt: skip
def test_a_template_that_fails_however_it_does_is_refused_by_name(source):
    with pytest.raises(UsageError) as caught:
        prompt_tokens(Tokenizer(source), SAID, 1000, 1000)
    assert caught.value.code == "template-refused"

"""Try a chat template within limits before it runs for good.

A template comes from a repository, and is a program: sandboxed by Jinja, so that it reaches nothing, but free to count
to 10^10 or to repeat a word as often. Here it runs once where it can be stopped, so that what runs unguarded afterwards
has shown that it ends.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 5.0
MAX_CHARACTERS = 8 << 20
"""Of what a template makes, or holds on the way."""
WIDE = re.compile(r"[0-9]{6}")
MAX_NUMBER = 1 << 20
"""Largest number that may tell how wide or how often."""


def try_template(source: str, messages: Sequence[Mapping[str, str]], words: Mapping[str, str]) -> None:
    """Render a conversation, and stop where it takes too long or grows too large.

    Args:
        source: The template.
        messages: What is to be said.
        words: Special tokens by name, such as ``bos_token``.

    Raises:
        TemplateError: It is no template, it refuses the conversation, or it was stopped.
        Exception: Whatever an expression of it raises.
    """
    environment = _Guarded(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        optimized=False,  # nothing is computed before it is watched
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _guarded(function) for name, function in environment.filters.items()}
    template = environment.from_string(source)
    length = 0
    with _limited():
        said = [dict(message) for message in messages]
        for part in template.generate(
            messages=said, tools=None, documents=None, add_generation_prompt=True, **dict(words)
        ):
            length += len(part)
            if length > MAX_CHARACTERS:
                raise SecurityError(f"it makes more than {MAX_CHARACTERS:,} characters")


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Guarded(ImmutableSandboxedEnvironment):
    """Refuses operations whose result may be larger than any prompt."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _require_small(_length(left) * abs(right) if isinstance(right, int) else 0)
            _require_small(_length(right) * abs(left) if isinstance(left, int) else 0)
        elif operator == "+":
            _require_small(_length(left) + _length(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require_small(left.bit_length() * abs(right))
        elif operator == "%":
            _require_narrow(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        _require_narrow(getattr(method, "__self__", None))
        _require_small_numbers((*args, *kwargs.values()))
        return super().call(context, called, *args, **kwargs)


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant says, and changes nothing in it."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 1


def _require_small(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"it makes something of {size:.1g} parts")


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is asked for nothing large."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if function is FILTERS["format"]:
            _require_narrow(args[0])
        _require_small_numbers((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return guarded


def _require_narrow(text: Any) -> None:
    """Refuse a format that may ask for a wide field."""
    if isinstance(text, str) and WIDE.search(text):
        raise SecurityError("it asks for a very wide field")


def _require_small_numbers(values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"it asks for {value:.1g} of something")


@contextmanager
def _limited() -> Iterator[None]:
    """Stop what runs inside at the end of its time, and where a variable of it grows too large."""
    deadline = time.monotonic() + MAX_SECONDS

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        if time.monotonic() > deadline:
            raise SecurityError(f"it takes longer than {MAX_SECONDS:.0f} s")
        if event == "line":
            _require_small(max((len(value) for value in frame.f_locals.values() if isinstance(value, str)), default=0))
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)

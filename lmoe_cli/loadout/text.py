"""YAML text as plain data that remembers where each value stood.

Only what a recipe needs: mappings, lists and scalars of YAML 1.2's core schema, so that ``1e-4`` is a number and ``on``
is text. Anchors, aliases, tags, merge keys and a second document are refused, as are size and depth beyond reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from lmoe_cli.findings import RefusedError, finding

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000
SCHEMA = "`lmoe schema loadout` and `lmoe schema train` print what such files hold"
SYNTAX = "look at this line and the one before: brackets and quotes close, and spaces indent, not tabs"

INTEGER = re.compile(r"[-+]?[0-9]+\Z")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}

Path = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Place:
    """Line and column, both from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Document:
    """Parsed YAML and where its parts stood."""

    name: str
    data: Any
    keys: dict[Path, Place]
    """Place of each mapping key, by its path."""
    values: dict[Path, Place]
    """Place of each value, by its path."""

    def place(self, path: Path, *, at_key: bool = False) -> Place:
        """Where a value or its key stood, or the nearest thing around it."""
        while path not in self.values:
            path, at_key = path[:-1], True
        return self.keys.get(path, self.values[path]) if at_key else self.values[path]


def parse_yaml(text: bytes, name: str) -> Document:
    """Parse one YAML document.

    Args:
        text: UTF-8, at most `MAX_BYTES`.
        name: Name of the file, for messages.

    Raises:
        RefusedError: Not YAML, or more than a recipe may use. Exit code 2.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    reader = _Reader(name)
    if len(text) > MAX_BYTES:
        reader.fail(Place(1, 1), f"{len(text)} bytes, at most {MAX_BYTES}", "name a recipe, not a file of data")
    try:
        return reader.document(yaml.parse(text.decode("utf-8-sig"), Loader=loader))
    except UnicodeDecodeError as error:
        reader.fail(Place(1, 1), f"byte {error.start} is not UTF-8", "save the file as UTF-8")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
        reader.fail(place, (error.problem or error.context or "not YAML").strip(), SYNTAX)
    except yaml.YAMLError as error:
        reader.fail(Place(1, 1), " ".join(str(error).split())[:160], SYNTAX)


class _Reader:
    """Builds data from YAML events."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: dict[Path, Place] = {}
        self.values: dict[Path, Place] = {}

    def fail(self, place: Place, reason: str, hint: str) -> NoReturn:
        where = f"{self.name}:{place.line}:{place.column}"
        found = finding("yaml-invalid", where, f"{where}: {reason}", hint)
        raise RefusedError(f"{self.name}: not readable", [found], exit_code=2)

    def document(self, events: Iterator[yaml.Event]) -> Document:
        next(events)  # the start of the stream
        first = next(events)
        if isinstance(first, yaml.StreamEndEvent):
            self.fail(Place(1, 1), "the file is empty", SCHEMA)
        data = self.value(next(events), events, ())
        next(events)  # the end of the document
        if not isinstance(second := next(events), yaml.StreamEndEvent):
            self.fail(_place(second), "a second document begins", "write it to a file of its own")
        return Document(self.name, data, self.keys, self.values)

    def value(self, event: yaml.Event, events: Iterator[yaml.Event], path: Path) -> Any:
        place = _place(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            self.fail(place, "anchors and aliases are not read", "write the value out in each place")
        if tag := getattr(event, "tag", None):
            self.fail(place, f"tags such as {tag} are not read", "leave it out; quotes make text of a value")
        if len(self.values) >= MAX_VALUES:
            self.fail(place, f"more than {MAX_VALUES} values", "name a recipe, not a file of data")
        if len(path) > MAX_DEPTH:
            self.fail(place, f"nested deeper than {MAX_DEPTH}", SCHEMA)
        self.values[path] = place
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(events, path)
        if isinstance(event, yaml.SequenceStartEvent):
            found: list[Any] = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                found.append(self.value(item, events, (*path, len(found))))
            return found
        assert isinstance(event, yaml.ScalarEvent)
        return event.value if event.style else self.scalar(event.value, place)

    def mapping(self, events: Iterator[yaml.Event], path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            place = _place(event)
            if not isinstance(event, yaml.ScalarEvent) or event.anchor or event.tag:
                self.fail(place, "keys must be plain words", "quote what begins with one of & * ! [ {")
            key = event.value
            if key == "<<":
                self.fail(place, "merge keys are not read", "write the keys out in each place")
            if key in found:
                self.fail(place, f"the key '{key}' stands twice", "keep one of the two")
            self.keys[*path, key] = place
            found[key] = self.value(next(events), events, (*path, key))
        return found

    def scalar(self, text: str, place: Place) -> Any:
        if text in WORDS:
            return WORDS[text]
        if len(text) <= 30:
            if INTEGER.match(text):
                return int(text)
            if FLOAT.match(text):
                return float(text)
        if text.lower().lstrip("+-") in (".inf", ".nan"):
            self.fail(place, f"{text} is not a number a recipe can hold", "write a finite one")
        return text


def is_text(scalar: str) -> bool:
    """Whether a scalar without quotes is read as text, not as a number, a truth value or nothing."""
    is_number = INTEGER.match(scalar) or FLOAT.match(scalar) or scalar.lower().lstrip("+-") in (".inf", ".nan")
    return scalar not in WORDS and not is_number


def _place(event: yaml.Event) -> Place:
    mark = event.start_mark
    return Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)

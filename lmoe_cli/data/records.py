"""Records of a JSONL file, one after the other: a file may be larger than memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmoe_cli import hashes
from lmoe_cli.disk import is_there
from lmoe_cli.engine.prompt import Message
from lmoe_cli.errors import InvalidFileError, NotFoundError
from lmoe_cli.files import opened
from lmoe_cli.split_names import split_name
from lmoe_cli.strict_json import parse_object

MAX_LINE_BYTES = 16 << 20
ROLES = ("system", "user", "assistant", "tool")
ONE_PER_LINE = "one JSON object per line, with 'messages' or 'text'"


@dataclass(frozen=True)
class Record:
    """One line of a data file: a conversation, or a text."""

    messages: tuple[Message, ...]
    """Empty where it is a text."""
    text: str | None
    """None where it is a conversation."""
    split: str | None
    """What the line's own ``split`` says, ``validation`` and the like as ``valid``; None where it says nothing."""
    where: str
    """File and line, for messages."""
    unlearned: frozenset[int] = frozenset()
    """Messages of the assistant, by number, that are only there to be read: those with ``"weight": 0``."""

    def is_learned(self, number: int) -> bool:
        """Whether a message is what the assistant is to say."""
        return self.messages[number]["role"] == "assistant" and number not in self.unlearned

    @property
    def learned(self) -> list[int]:
        """Numbers of the messages that the assistant is to say."""
        return [number for number in range(len(self.messages)) if self.is_learned(number)]

    @property
    def digest(self) -> bytes:
        """SHA-256 of what it says, whatever its file, line, split and other keys."""
        said = self.text if self.text is not None else [[one["role"], one["content"]] for one in self.messages]
        return hashlib.sha256(json.dumps(said).encode()).digest()


def read_records(path: Path) -> Iterator[Record]:
    """Read a data file line by line.

    A line is an object with ``messages``, a list of ``{"role", "content"}``, or with ``text``. It may have a ``split``,
    and a message of the assistant a ``weight``, 0 or 1; other keys are ignored. Blank lines pass.

    Raises:
        NotFoundError: It is not there.
        InvalidFileError: It holds no record, or a line of it is none.
    """
    if not is_there(path):
        hint = "check the spelling and the folder"
        raise NotFoundError("not-found", f"{path}: no such data file", hint=hint, where=str(path))
    is_empty = True
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                message = f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB"
                raise InvalidFileError("data-invalid", message, hint=ONE_PER_LINE, where=where)
            if line.strip():
                is_empty = False
                yield _record(line.strip(), where)
    if is_empty:
        raise InvalidFileError("data-empty", f"{path}: holds no record", hint=ONE_PER_LINE, where=str(path))


def data_hash(path: Path) -> str:
    """SHA-256 of a data file, in hexadecimal: by it a trained gate knows what it was trained on."""
    return hashes.sha256(path)


def _record(line: bytes, where: str) -> Record:
    try:
        entry = parse_object(line, where, nonfinite=True)  # other keys may hold what they like
    except InvalidFileError as error:
        raise InvalidFileError("data-invalid", error.message, hint=ONE_PER_LINE, where=where) from error
    split, text = entry.get("split"), entry.get("text")
    if split is not None and not (isinstance(split, str) and split.strip()):
        raise _invalid(where, "'split' is not a word", 'such as "train" or "valid"')
    split = split_name(split) if split else None
    if ("messages" in entry) == ("text" in entry):
        which = "both" if "text" in entry else "neither"
        raise _invalid(where, f"has {which} of 'messages' and 'text'", "one of the two on every line")
    if "text" not in entry:
        messages = _messages(entry["messages"], where)
        return Record(messages, None, split, where, _unlearned(entry["messages"], where))
    if not isinstance(text, str):
        raise InvalidFileError("data-content", f"{where}: 'text' is not text", hint="a string", where=where)
    if not text:
        raise InvalidFileError("data-content", f"{where}: 'text' is empty", hint="remove the line", where=where)
    return Record((), text, split, where)


def _messages(found: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise _invalid(where, "'messages' is not a list of messages", '[{"role": "user", "content": "…"}, …]')
    messages = []
    for number, one in enumerate(found, 1):
        if not isinstance(one, dict):
            raise _invalid(where, f"message {number} is not an object", '{"role": "user", "content": "…"}')
        role, content = one.get("role"), one.get("content")
        if role not in ROLES:
            said = f"the role {json.dumps(role)[:80]}" if "role" in one else "no role"
            message = f"{where}: message {number} has {said}"
            raise InvalidFileError("data-role", message, hint=f"one of {', '.join(ROLES)}", where=where)
        if not isinstance(content, str):
            message = f"{where}: the content of message {number} is not text"
            raise InvalidFileError("data-content", message, hint="a string; lmoe reads text alone", where=where)
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _unlearned(found: list[dict[str, Any]], where: str) -> frozenset[int]:
    """Messages of weight 0, of a list of messages."""
    mine = {number: one for number, one in enumerate(found) if one["role"] == "assistant"}
    for number, one in mine.items():
        weight = one.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise _invalid(where, f"the weight of message {number + 1} is neither 0 nor 1", "1 is learned, 0 only read")
    said = {number for number, one in mine.items() if one["content"].strip()}
    unlearned = frozenset(number for number, one in mine.items() if one.get("weight") == 0)
    if not said - unlearned:
        message = f"{where}: the assistant says nothing" + (" of weight 1" if said else "")
        hint = "what the assistant says is learned and judged: add it, or remove the line"
        raise InvalidFileError("data-unanswered", message, hint=hint, where=where)
    return unlearned


def _invalid(where: str, reason: str, hint: str) -> InvalidFileError:
    return InvalidFileError("data-invalid", f"{where}: {reason}", hint=hint, where=where)

"""Texts that say what an expert is for: the recipe's examples, a file of them, or its description."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmoe_cli.errors import InvalidFileError, LmoeError, NotFoundError
from lmoe_cli.files import opened
from lmoe_cli.findings import Finding, finding, from_error
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.routers import EncoderRouter
from lmoe_cli.strict_json import parse_object

MOST = 64
"""Texts of a file that are read: their mean is what counts, and each is computed when the loadout is loaded."""
MAX_LINE_BYTES = 1 << 20


def texts_of(expert: Expert, folder: Path | None) -> list[str]:
    """What an expert is for, as texts; none where its entry has no ``examples``, ``data`` or ``description``.

    Args:
        expert: Of the loadout.
        folder: Of the recipe.

    Raises:
        NotFoundError: Its data file is not there.
        InvalidFileError: A line of it is not what `data` may hold.
    """
    found = list(expert.entry.examples)
    if expert.entry.data:
        found += _file(_beside(expert.entry.data, folder))
    return found or ([expert.entry.description] if expert.entry.description else [])


def _beside(name: str, folder: Path | None) -> Path:
    path = Path(name).expanduser()
    return folder / path if folder and (folder / path).exists() else path


def _file(path: Path) -> list[str]:
    if not path.is_file():
        raise NotFoundError(
            "not-found", f"{path}: no such file", hint="'data' names a file of prompts", where=str(path)
        )
    found: list[str] = []
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                where = f"{path}:{number}"
                raise InvalidFileError("data-invalid", f"{where}: longer than any honest line", where=where)
            if line.strip():
                found += _line(line.strip(), f"{path}:{number}", is_json=path.suffix in (".jsonl", ".json"))
            if len(found) >= MOST:
                break
    return found[:MOST]


def _line(line: bytes, where: str, *, is_json: bool) -> list[str]:
    if not is_json:
        return [line.decode("utf-8", errors="replace")]
    entry = parse_object(line, where)
    messages: Any = entry.get("messages")
    if isinstance(entry.get("text"), str):
        return [entry["text"]]
    if isinstance(messages, list):
        said = [one.get("content") for one in messages if isinstance(one, dict) and one.get("role") == "user"]
        if texts := [text for text in said if isinstance(text, str) and text.strip()]:
            return texts[:1]
    message = f"{where}: neither 'text' nor 'messages' with something that a user says"
    raise InvalidFileError("data-invalid", message, where=where)


def about_examples(loadout: Loadout) -> Iterator[Finding]:
    """Whether an encoder has something to compare prompts with, for every expert."""
    if not isinstance(loadout.recipe.router, EncoderRouter):
        return
    for expert in loadout.experts:
        try:
            texts = texts_of(expert, loadout.folder)
        except LmoeError as error:
            told = from_error(error)
            yield Finding(told.code, "error", expert.name, f"{expert.name}: {told.message}", told.hint)
            continue
        if not texts:
            message = f"{expert.name}: nothing says what it is for, so no prompt can be sent to it"
            yield finding("examples-missing", expert.name, message, "give it 'examples', 'data' or 'description'")

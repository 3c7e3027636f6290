"""Texts that say what an expert is for: the recipe's examples, a file of them, or its description."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmoe_cli.errors import InvalidFileError, LmoeError
from lmoe_cli.files import opened
from lmoe_cli.findings import Finding, finding, from_error
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.routers import EncoderRouter
from lmoe_cli.split_names import HELD_OUT, split_name
from lmoe_cli.strict_json import parse_object

PACKAGE = "sentence_transformers"
MOST = 64
"""Texts of a file that are read: their mean is what counts, and each is computed when the loadout is loaded."""
MAX_LINE_BYTES = 1 << 20
JSON = (".jsonl", ".json", ".ndjson")


def texts_of(expert: Expert, folder: Path | None) -> list[str]:
    """What an expert is for, as texts; none where its entry has no ``examples``, ``data`` or ``description``.

    Args:
        expert: Of the loadout.
        folder: Of the recipe.

    Raises:
        NotFoundError: Its data file is not there.
        InvalidFileError: A line of it is not what `data` may hold.
    """
    found = [text for text in expert.entry.examples if text.strip()]
    if expert.entry.data:
        found += _file(found_beside(expert.entry.data, folder))
    return found or ([expert.entry.description] if expert.entry.description.strip() else [])


def found_beside(name: str, folder: Path | None) -> Path:
    """What a recipe means by a file or folder: first beside the recipe, then where the command runs.

    Args:
        name: As written.
        folder: Of the recipe.

    Returns:
        Where it is; where it would be if there is none.
    """
    try:
        path = Path(name).expanduser()
        return folder / path if folder and (folder / path).exists() else path
    except (RuntimeError, OSError):  # "~somebody" whom nobody knows, or a name longer than any file's
        return Path(name)


def _file(path: Path) -> list[str]:
    found: list[str] = []
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                where = f"{path}:{number}"
                raise InvalidFileError("data-invalid", f"{where}: longer than any honest line", where=where)
            if line.strip():
                found += _line(line.strip(), f"{path}:{number}", is_json=path.suffix.lower() in JSON)
            if len(found) >= MOST:
                break
    return found[:MOST]


def _line(line: bytes, where: str, *, is_json: bool) -> list[str]:
    if not is_json:
        try:
            return [text] if (text := line.decode("utf-8-sig").strip()) else []
        except UnicodeDecodeError as error:
            message = f"{where}: byte {error.start} is not UTF-8"
            raise InvalidFileError("data-invalid", message, hint="save the file as UTF-8", where=where) from error
    entry = parse_object(line, where)
    if isinstance(split := entry.get("split"), str) and split_name(split) in HELD_OUT:
        return []
    messages: Any = entry.get("messages")
    if isinstance(own := entry.get("text"), str) and own.strip():
        return [own]
    if isinstance(messages, list):
        said = [one.get("content") for one in messages if isinstance(one, dict) and one.get("role") == "user"]
        if texts := [text for text in said if isinstance(text, str) and text.strip()]:
            return texts[:1]
    message = f"{where}: neither 'text' nor 'messages' with something that a user says"
    raise InvalidFileError("data-invalid", message, where=where)


def about_examples(loadout: Loadout) -> Iterator[Finding]:
    """Whether an encoder can read texts, and has some to compare prompts with, for every expert."""
    router = loadout.recipe.router
    if not isinstance(router, EncoderRouter):
        return
    yield from _about_encoder(loadout, router)
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


def _about_encoder(loadout: Loadout, router: EncoderRouter) -> Iterator[Finding]:
    base = loadout.base
    if router.encoder:
        if find_spec(PACKAGE) is None:
            message = f"{loadout.origin}: the router's 'encoder' needs {PACKAGE}, which is not installed"
            yield finding("extra-missing", loadout.origin, message, "pip install 'lmoe-cli[encoder]'")
        return
    if not base.has_tokenizer:
        message = f"{base.ref}: no tokenizer, so it cannot embed the prompts that the router reads"
        yield finding("encoder-tokenizer", base.ref, message, "name a sentence-transformers model as 'encoder'")
    blocks = base.text_config.get("num_hidden_layers", base.text_config.get("n_layer"))
    if router.layer is not None and isinstance(blocks, int) and router.layer >= blocks:
        message = f"{loadout.origin}: {base.ref} has no block {router.layer} to embed texts by"
        yield finding("layer-missing", loadout.origin, message, f"'layer' is from 0 to {blocks - 1}")

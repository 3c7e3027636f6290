"""Turn a recipe file into a `Recipe`, or say everything that is wrong with it and where."""

from __future__ import annotations

import types
import typing
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from lmoe_cli import files
from lmoe_cli.disk import is_there
from lmoe_cli.errors import NotFoundError
from lmoe_cli.findings import Finding, RefusedError, finding
from lmoe_cli.loadout import text
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.routers import BUILT_IN, PluginRouter, plugin_settings

Model = TypeVar("Model", bound=BaseModel)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        NotFoundError: It is not there.
        RefusedError: Not YAML, or not a recipe. Every finding begins with ``file:line:column``. Exit code 2.
    """
    if not is_there(path):
        hint = "lmoe init FILE --from ADAPTER… writes one"
        raise NotFoundError("not-found", f"{path}: no such recipe", hint=hint, where=str(path))
    return parse_recipe(text.parse_yaml(files.read_bytes(path, text.MAX_BYTES), str(path)))


def parse_recipe(document: text.Document) -> Recipe:
    """Check parsed YAML against the recipe models. See `read_recipe` for the errors."""
    return parse_as(Recipe, document, "recipe-invalid", "a recipe")


def parse_as(model: type[Model], document: text.Document, code: str, kind: str) -> Model:
    """Check parsed YAML against a model.

    Args:
        model: Of the whole document.
        document: What was written.
        code: Of the findings.
        kind: What the document should be, with its article, for messages.

    Raises:
        RefusedError: It is not. Every finding begins with ``file:line:column``. Exit code 2.
    """
    if not isinstance(document.data, dict):
        where = f"{document.name}:1:1"
        found = [finding(code, where, f"{where}: {kind} is a mapping with 'base' and 'experts'", text.SCHEMA)]
        raise RefusedError(f"{document.name}: not {kind}", found, exit_code=2)
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        told = {_told(model, document, code, kind, item) for item in error.errors(include_url=False)}
        found = [item for _, item in sorted(told, key=lambda pair: (pair[0], pair[1].message))]
        verdict = f"{document.name}: {len(found)} error{'s' if len(found) != 1 else ''}"
        raise RefusedError(verdict, found, exit_code=2) from error


def _told(
    model: type[BaseModel], document: text.Document, code: str, a_kind: str, item: Any
) -> tuple[text.Place, Finding]:
    """One complaint of pydantic as a finding with a place and, where it can be guessed, the word that was meant."""
    kind, message, hint = item["type"], item["msg"], ""
    path = _written(document, item["loc"])
    name = ".".join(str(part) for part in path)
    place = document.place(path, at_key=kind == "extra_forbidden" or item["loc"][-1:] == ("[key]",))
    where = f"{document.name}:{place.line}:{place.column}"
    known = sorted(_known_keys(model, path[:-1], document.data))
    if kind == "extra_forbidden":
        close = get_close_matches(str(path[-1]), known, n=1)
        parent = ".".join(str(part) for part in path[:-1]) or a_kind
        message = f"{parent} has no key '{path[-1]}'"
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
    elif kind == "missing":
        message = f"{'.'.join(str(part) for part in path[:-1]) or a_kind.replace('a ', 'the ')} needs '{path[-1]}'"
        hint = f"known keys: {', '.join(known)}"
    elif kind in ("literal_error", "union_tag_invalid"):
        expected = item["ctx"].get("expected") or item["ctx"].get("expected_tags", "")
        seen = item["input"].get("type") if isinstance(item["input"], dict) else item["input"]
        message = f"{name} cannot be {seen!r}"
        words = [word.strip(" '") for word in str(expected).replace(" or ", ", ").split(",")]
        close = get_close_matches(str(seen), words, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(words)}"
    else:
        hint = str(item.get("ctx", {}).get("hint", ""))
        seen = "" if isinstance(item["input"], dict | list) else f", got {item['input']!r}"
        message = f"{name + ': ' if name else ''}{message[0].lower()}{message[1:]}{seen}"
        message = message.replace("value error, ", "")
    return place, finding(code, where, f"{where}: {message}", hint)


def _written(document: text.Document, location: tuple[str | int, ...]) -> text.Path:
    """The part of pydantic's location that stands in the file, without the tags of unions and the markers of keys."""
    path: text.Path = ()
    for part in location:
        is_tag = str(part).startswith(("<", "[")) or (path == ("router",) and part in BUILT_IN)
        if (*path, part) in document.values or not is_tag:
            path = (*path, part)
    return path


def _known_keys(model: type[BaseModel], path: text.Path, data: Any) -> set[str]:
    """Keys that may stand in the mapping at a path of a document."""
    annotations: list[Any] = [model]
    for part in path:
        data = data[part] if isinstance(data, dict) else data[int(part)] if isinstance(data, list) else None
        annotations = [inner for annotation in annotations for inner in _inside(annotation, part)]
        annotations += _of_plugin(annotations, data)
    chosen = data.get("type") if isinstance(data, dict) else None
    return {
        name
        for annotation in annotations
        for option in _alternatives(annotation)
        if _is_model(option) and _has_type(option, chosen)
        for name in option.model_fields
    }


def _of_plugin(annotations: list[Any], data: Any) -> list[Any]:
    """The settings of the plug-in's router that a mapping names, where it may name one."""
    if not any(PluginRouter in _alternatives(annotation) for annotation in annotations) or not isinstance(data, dict):
        return []
    try:
        return [plugin_settings(data["type"])]
    except (PydanticCustomError, KeyError, TypeError):
        return []


def _inside(annotation: Any, part: str | int) -> list[Any]:
    """What a field, a mapping or a list of the recipe models holds under a key or number."""
    found: list[Any] = []
    for option in _alternatives(annotation):
        if _is_model(option):
            found += [option.model_fields[part].annotation] if part in option.model_fields else []
        elif typing.get_origin(option) in (dict, list):
            found.append(typing.get_args(option)[-1])
    return found


def _alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows, through unions and `Annotated`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [option for argument in typing.get_args(annotation) for option in _alternatives(argument)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _has_type(model: type[BaseModel], chosen: Any) -> bool:
    """Whether a model of a union is the one that the ``type`` key chose."""
    kind = model.model_fields.get("type")
    return kind is None or chosen is None or kind.annotation is str or chosen in typing.get_args(kind.annotation)

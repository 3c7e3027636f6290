"""The JSON Schema of recipes, in the draft that editors understand."""

from __future__ import annotations

from typing import Any

from lmoe_cli.loadout.recipe import Recipe

DRAFT = "http://json-schema.org/draft-07/schema#"
TITLE = "lmoe loadout, version 1"


def recipe_schema() -> dict[str, Any]:
    """The schema, draft-07: pydantic's own is of a later draft, whose ``$defs`` are ``definitions`` here."""
    schema = _older(Recipe.model_json_schema())
    schema.pop("description", None)
    return {"$schema": DRAFT, "title": TITLE, **{key: schema[key] for key in schema if key != "title"}}


def _older(value: Any) -> Any:
    if isinstance(value, dict):
        renamed = {"$defs": "definitions"}
        plain = {key: item for key, item in value.items() if key not in ("title", "discriminator") or _is_field(item)}
        return {renamed.get(key, key): _older(item) for key, item in plain.items()}
    if isinstance(value, list):
        return [_older(item) for item in value]
    return value.replace("#/$defs/", "#/definitions/") if isinstance(value, str) else value


def _is_field(value: Any) -> bool:
    """Whether ``title`` names a field of a recipe, and not the title of a schema."""
    return isinstance(value, dict) and "type" in value

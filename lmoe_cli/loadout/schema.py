"""The JSON Schema of recipes, in the draft that editors understand."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.routers import plugin_settings, plugins

DRAFT = "http://json-schema.org/draft-07/schema#"
TITLE = "lmoe loadout, version 1"


def recipe_schema() -> dict[str, Any]:
    """The schema of recipes, draft-07, with the settings of the routers that are installed here."""
    schema = schema_of(Recipe, TITLE)
    definitions = schema["definitions"]
    for name in plugins():
        try:
            model = plugin_settings(name)
        except PydanticCustomError:  # broken: `lmoe check` says why
            continue
        own = _older(model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}"))
        definitions |= {f"{name}.{key}": inner for key, inner in own.pop("definitions", {}).items()}
        own["properties"]["type"] = {**own["properties"]["type"], "const": name}
        definitions[name] = own
        definitions["PluginRouter"]["properties"]["type"]["not"]["enum"].append(name)
        schema["properties"]["router"]["oneOf"].append({"$ref": f"#/definitions/{name}"})
    return schema


def schema_of(model: type[BaseModel], title: str) -> dict[str, Any]:
    """A model's schema, draft-07: pydantic's own is of a later draft, whose ``$defs`` are ``definitions`` here."""
    schema = _older(model.model_json_schema())
    schema.pop("description", None)
    return {"$schema": DRAFT, "title": title, **{key: schema[key] for key in schema if key != "title"}}


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

"""Make the page on the keys of recipes and training configs from their schemas: python docs/keys_page.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = {
    "loadout-v1.json": {
        "Recipes": "",
        "experts: NAME:": "ExpertEntry",
        "weight, as a list of rules": "WeightRule",
        "router: {type: static}": "StaticRouter",
        "router: {type: weighted}": "WeightedRouter",
        "router: {type: encoder}": "EncoderRouter",
        "router: {type: arrow}": "ArrowRouter",
        "router: {type: gate}": "GateRouter",
        "modules_to_save, to take one": "Take",
        "chat:": "ChatSettings",
        "bake:": "BakeSettings",
    },
    "train-v1.json": {
        "Training configs": "",
        "experts: NAME: (training)": "TrainedExpert",
        "data: (training)": "Data",
        "gate: (training)": "GateEntry",
        "stages: (training)": "Stage",
        "trainer: (training)": "Trainer",
    },
}
OPENING = """# Keys

All that a [recipe](recipes.md) and a [training config](training.md) may say. A stage's own word comes before that of
`trainer:`, and what neither says is as the last column tells.

This page is made from `lmoe schema` and `lmoe schema train`: `python docs/keys_page.py`.
"""
BOUNDS = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}


def page() -> str:
    """The page as Markdown."""
    parts = [OPENING]
    for file, titles in PARTS.items():
        schema = json.loads((ROOT / "schemas" / file).read_text())
        for title, name in titles.items():
            own = schema["definitions"][name] if name else schema
            parts.append(f"\n## {title}\n\n| key | takes | when left out | is |\n| --- | --- | --- | --- |\n")
            parts += [_line(key, value, key in own.get("required", ())) for key, value in own["properties"].items()]
    return "".join(parts)


def _line(key: str, value: Mapping[str, Any], is_due: bool) -> str:
    default = value.get("default")
    plain = default is not None and default != "" and not isinstance(default, dict)
    left_out = "must be there" if is_due else f"`{json.dumps(default)}`" if plain else "–"
    cells = (f"`{key}`", ", ".join(dict.fromkeys(_kinds(value))), left_out, value.get("description", ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _kinds(value: Mapping[str, Any]) -> Iterator[str]:
    """What a key takes, in words."""
    if own := [*value.get("anyOf", ()), *value.get("oneOf", ())]:
        for one in own:
            yield from _kinds(one)
    elif "const" in value:
        yield f"`{value['const']}`"
    elif "enum" in value:
        yield from (f"`{word}`" for word in value["enum"])
    elif "$ref" in value:
        yield "keys of its own"
    elif value.get("type") == "array":
        yield f"a list of {' or '.join(dict.fromkeys(_kinds(value.get('items', {}))))}"
    elif value.get("type") in ("integer", "number"):
        bounds = [f"{sign}{value[key]}" for key, sign in BOUNDS.items() if key in value]
        yield " ".join(["a whole number" if value["type"] == "integer" else "a number", *bounds])
    elif value.get("type") == "boolean":
        yield "`true`, `false`"
    elif value.get("type") == "object":
        yield "names, each with keys of its own"
    elif value.get("type") == "string":
        yield "text"


if __name__ == "__main__":
    Path(__file__).with_name("keys.md").write_text(page())

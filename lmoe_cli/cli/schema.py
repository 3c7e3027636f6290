"""`lmoe schema`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The schema is JSON with or without this.")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of recipes.

    Editors with a YAML language server check and complete recipes whose first line names it.
    """
    del as_json
    from lmoe_cli.loadout.schema import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))

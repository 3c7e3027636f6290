"""`lmoe schema`."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("kind", type=click.Choice(["loadout", "train"]), default="loadout")
@click.option("--json", "as_json", is_flag=True, help="The schema is JSON with or without this.")
def schema(kind: str, as_json: bool) -> None:
    """Print the JSON Schema of recipes, or of training configs.

    Editors with a YAML language server check and complete files whose first line names it.
    """
    del as_json
    if kind == "train":
        from lmoe_cli.train.config import train_schema as made
    else:
        from lmoe_cli.loadout.schema import recipe_schema as made
    click.echo(json.dumps(made(), indent=2, ensure_ascii=False))

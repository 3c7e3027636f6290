"""`lmoe completion`."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell completion script.

    Load it with: source <(lmoe completion bash)
    """
    from click.shell_completion import get_completion_class

    from lmoe_cli.cli.root import lmoe

    found = get_completion_class(shell)
    assert found is not None, f"click knows {shell}"
    click.echo(found(lmoe, {}, "lmoe", "_LMOE_COMPLETE").source())

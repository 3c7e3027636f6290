"""The root command: `lmoe`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from lmoe_cli import __version__
from lmoe_cli.cli.lazy import Entry, LazyGroup
from lmoe_cli.errors import EXIT_BUG, EXIT_INTERRUPTED, LmoeError, ResourceError, UsageError

COMMANDS = {
    "chat": Entry("lmoe_cli.cli.chat:chat", "Talk to a loadout, or answer one prompt."),
    "pull": Entry("lmoe_cli.cli.pull:pull", "Download adapters, or what a recipe names, from the Hub."),
    "ls": Entry("lmoe_cli.cli.store:ls", "List the adapters and loadouts on this machine."),
    "rm": Entry("lmoe_cli.cli.store:rm", "Remove an adapter from this machine."),
    "inspect": Entry("lmoe_cli.cli.inspect:inspect", "Say what an adapter, base or loadout is, from headers alone."),
    "check": Entry("lmoe_cli.cli.check:check", "Check that the parts of recipes fit together."),
    "init": Entry("lmoe_cli.cli.init:init", "Write a recipe for some adapters."),
    "schema": Entry("lmoe_cli.cli.schema:schema", "Print the JSON Schema of recipes."),
    "bake": Entry("lmoe_cli.cli.bake:bake", "Write a loadout as one ordinary model or adapter."),
    "bench": Entry("lmoe_cli.cli.bench:bench", "Measure the speed of base, blend and folded blend, side by side."),
    "completion": Entry("lmoe_cli.cli.completion:completion", "Print the shell completion script."),
}


@click.group(cls=LazyGroup, entries=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="lmoe")
def lmoe() -> None:
    r"""Compose LoRA adapters into one model that is several things at once.

    \b
    lmoe chat                        talk to the embedded battle-mage, offline
    lmoe inspect adapter REF         what an adapter is, before downloading it
    lmoe check RECIPE                whether the parts fit together
    """


def main() -> NoReturn:
    """Run `lmoe`, turning the errors a user can cause into a line, a hint and an exit code."""
    arguments = sys.argv[1:]
    try:
        try:
            code = lmoe.main(arguments, prog_name="lmoe", standalone_mode=False)
            sys.stdout.flush()
            sys.exit(code if isinstance(code, int) else 0)
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _leave(LmoeError("interrupted", "interrupted"), arguments, EXIT_INTERRUPTED)
        except click.UsageError as error:
            _leave(_usage(error), arguments)
        except click.ClickException as error:
            _leave(UsageError("usage", error.format_message()), arguments)
        except LmoeError as error:
            if "--debug" in arguments:
                raise
            _leave(error, arguments)
        except MemoryError:
            hint = "use a smaller base or another machine"
            _leave(ResourceError("out-of-memory", "not enough memory", hint=hint), arguments)
        except BrokenPipeError:
            raise
        except Exception as error:
            if "--debug" in arguments:
                raise
            _leave(_bug(error), arguments, EXIT_BUG)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _usage(error: click.UsageError) -> UsageError:
    hint = f"{error.ctx.command_path} --help" if error.ctx else "lmoe --help"
    return UsageError("usage", error.format_message(), hint=hint)


def _bug(error: Exception) -> LmoeError:
    message = f"a bug in lmoe: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return LmoeError("bug", message, hint="run it again with --debug and report what it prints")


def _leave(error: LmoeError, arguments: list[str], code: int | None = None) -> NoReturn:
    from lmoe_cli.cli.output import show_error

    command = next((argument for argument in arguments if not argument.startswith("-")), "lmoe")
    show_error(error, command=command, as_json="--json" in arguments)
    sys.exit(error.exit_code if code is None else code)

"""The root command: `lmoe`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lmoe_cli import __version__
from lmoe_cli.cli.lazy import Entry, LazyGroup
from lmoe_cli.cli.process import TerminatedError, Unfailing
from lmoe_cli.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_SIGNAL,
    LmoeError,
    ResourceError,
    UsageError,
    is_out_of_memory,
)

COMMANDS = {
    "chat": Entry("lmoe_cli.cli.chat:chat", "Talk to a loadout, or answer one prompt."),
    "pull": Entry("lmoe_cli.cli.pull:pull", "Download adapters, or what a recipe names, from the Hub."),
    "ls": Entry("lmoe_cli.cli.store:ls", "List the adapters and loadouts on this machine."),
    "rm": Entry("lmoe_cli.cli.store:rm", "Remove an adapter from this machine."),
    "inspect": Entry("lmoe_cli.cli.inspect:inspect", "Say what an adapter, base or loadout is, from headers alone."),
    "check": Entry("lmoe_cli.cli.check:check", "Check that the parts of recipes fit together."),
    "init": Entry("lmoe_cli.cli.init:init", "Write a recipe for some adapters."),
    "schema": Entry("lmoe_cli.cli.schema:schema", "Print the JSON Schema of recipes, or of training configs."),
    "route": Entry("lmoe_cli.cli.route:route", "Show which expert has how much say in which token."),
    "train": Entry("lmoe_cli.cli.train:train", "Train experts, the gate between them, or both."),
    "bake": Entry("lmoe_cli.cli.bake:bake", "Write a loadout as one ordinary model or adapter."),
    "bench": Entry("lmoe_cli.cli.bench:bench", "Measure the speed of base, blend and folded blend, side by side."),
    "eval": Entry(
        "lmoe_cli.cli.evaluate:evaluate", "Judge a recipe on held-out data, beside the base, its experts and controls."
    ),
    "fit": Entry("lmoe_cli.cli.fit:fit", "Find the fixed weights that suit some data, and write them as a recipe."),
    "similarity": Entry("lmoe_cli.cli.similarity:similarity", "Compare the deltas of adapters."),
    "router": Entry("lmoe_cli.cli.router:router", "Change the experts of a trained gate, without training it again."),
    "completion": Entry("lmoe_cli.cli.completion:completion", "Print the shell completion script."),
}


@click.group(cls=LazyGroup, entries=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="lmoe")
def lmoe() -> None:
    """Compose LoRA adapters into one model that is several things at once.

    \b
    lmoe chat                        talk to the embedded battle-mage, offline
    lmoe inspect adapter REF         what an adapter is, before downloading it
    lmoe check RECIPE                whether the parts fit together
    """  # noqa: D301 - click marks text to be left as it is with a backspace


def run(arguments: list[str]) -> int:
    """Run a command line, turning the errors a user can cause into a line, a hint and an exit code."""
    try:
        code = lmoe.main(arguments, prog_name="lmoe", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command says what it has
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt, TerminatedError) as ended:
        return _end(ended, arguments)
    except Exception as error:
        if "--debug" in arguments and not isinstance(error, click.ClickException):
            raise
        told = _told(error)
        if told.code == "bug" and (cause := _signal_behind(error)):
            return _end(cause, arguments)
        return _tell(told, arguments, EXIT_BUG if told.code == "bug" else told.exit_code)


def _end(ended: BaseException, arguments: list[str]) -> int:
    """Tell that a signal, or a person, ended the command."""
    if isinstance(ended, TerminatedError):
        return _tell(LmoeError("interrupted", f"ended by {ended.number.name}"), arguments, EXIT_SIGNAL + ended.number)
    return _tell(LmoeError("interrupted", "interrupted"), arguments, EXIT_INTERRUPTED)


def _signal_behind(error: BaseException | None) -> BaseException | None:
    """What an error came out of, if a signal: where that strikes inside of a lock, the lock fails on its way out."""
    while error and not isinstance(error, KeyboardInterrupt | TerminatedError):
        error = error.__context__
    return error


def unwritten(stdout: Unfailing | None, code: int) -> int:
    """Tell what stdout did not take; a command that did its work otherwise has failed with it."""
    sys.stdout.flush()
    if stdout is None or stdout.failure is None or stdout.is_unread:
        return code
    from lmoe_cli.files import writing

    try:
        with writing(Path("stdout")):
            raise stdout.failure
    except LmoeError as error:
        return _tell(error, [], code or error.exit_code)


def _told(error: Exception) -> LmoeError:
    """Any exception as an error for the user; one that nobody foresaw is a bug."""
    if isinstance(error, LmoeError):
        return error
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"{context.command_path} --help" if context else "lmoe --help"
        return UsageError("usage", error.format_message(), hint=hint)
    if is_out_of_memory(error):
        hint = "use a smaller base, --quantize nf4, or another machine"
        return ResourceError("out-of-memory", "not enough memory", hint=hint)
    message = f"a bug in lmoe: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return LmoeError("bug", message, hint="run it again with --debug and report what it prints")


def _tell(error: LmoeError, arguments: list[str], code: int) -> int:
    from lmoe_cli.cli.output import show_error

    command = next((argument for argument in arguments if not argument.startswith("-")), "lmoe")
    show_error(error, command=command, as_json="--json" in arguments)
    return code

"""What can be typed: messages, and commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from lmoe_cli.chat import actions
from lmoe_cli.chat.events import Event, Facts, Leave
from lmoe_cli.chat.quoted import QUOTES, message
from lmoe_cli.chat.session import Session
from lmoe_cli.errors import LmoeError, NotFoundError
from lmoe_cli.findings import RefusedError, from_error

Kind = Literal["nothing", "weights", "expert", "setting", "file", "switch"]


@dataclass(frozen=True)
class Command:
    """A word with a slash and what it does."""

    name: str
    arguments: str
    """As the help shows them."""
    summary: str
    run: Callable[[Session, str], Iterable[Event]]
    takes: Kind = "nothing"
    """What completion offers after it."""
    at_once: bool = False
    """Works while an answer streams; the others wait for its end."""


def handle(session: Session, line: str) -> Iterator[Event]:
    """Do what a line of input says. Errors a user can cause are told like everything else."""
    try:
        yield from _handle(session, line)
    except RefusedError as error:
        yield from error.findings
    except LmoeError as error:
        yield from_error(error)


def _handle(session: Session, line: str) -> Iterator[Event]:
    command, argument = _split(line)
    if command is not None:
        yield from command.run(session, argument)
    elif text := message(line):
        yield from session.answer(text)


def acts_at_once(line: str) -> bool:
    """Whether a line may be handled while an answer streams."""
    try:
        command, _ = _split(line)
    except NotFoundError:
        return True
    return command is not None and command.at_once


def _split(line: str) -> tuple[Command | None, str]:
    if not line.startswith("/"):
        return None, ""
    name, *rest = line.split(maxsplit=1)
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists commands; a space in front makes it a message"
        raise NotFoundError("command-unknown", f"no command {name}", hint=hint)
    return COMMANDS[name], "".join(rest).strip()


def _help(session: Session, _: str) -> Iterator[Event]:
    del session
    rows = [(f"{command.name} {command.arguments}".strip(), command.summary) for command in COMMANDS.values()]
    rows += [
        (f"{QUOTES} … {QUOTES}", "a message of several lines"),
        ("Alt-↑ Alt-↓", "turn the selected weight, also while an answer comes"),
        ("Alt-← Alt-→", "select another expert"),
        ("Ctrl-C", "stop the answer, or clear the line"),
        ("Ctrl-D", "leave"),
    ]
    yield Facts("commands", tuple(rows))


def _bye(session: Session, _: str) -> Iterator[Event]:
    del session
    yield Leave()


_ALL = (
    Command("/w", "[NAME=WEIGHT …]", "turn weights, or show them", actions.turn, "weights", at_once=True),
    Command("/solo", "[NAME]", "mute the others, or bring all back", actions.solo, "expert", at_once=True),
    Command("/mute", "NAME", "mute an expert, or bring it back", actions.mute, "expert", at_once=True),
    Command("/base", "", "mute all experts, or bring them back", actions.base, at_once=True),
    Command("/ab", "TEXT", "answer under the blend and under the base, and forget both", actions.compare),
    Command("/route", "[on|off]", "show what the router chose for each token", actions.route, "switch", at_once=True),
    Command("/set", "[KEY [VALUE]]", "change a sampling setting, or show them", actions.set_, "setting", at_once=True),
    Command("/system", "[TEXT]", "set the system message, or drop it", actions.system, at_once=True),
    Command("/show", "", "what is loaded, and every setting", actions.show, at_once=True),
    Command("/load", "FILE", "go on with another loadout", actions.load, "file"),
    Command("/save", "FILE [--force]", "write a recipe with the weights in force", actions.save, "file", at_once=True),
    Command("/retry", "", "answer the last message again", actions.retry),
    Command("/undo", "", "forget the last message and its answer", actions.undo),
    Command("/stats", "", "speed, tokens and memory of this session", actions.stats, at_once=True),
    Command("/bake", "DIR [--force]", "bake the weights in force into an ordinary model", actions.bake, "file"),
    Command("/clear", "", "start a new conversation", actions.clear),
    Command("/help", "", "this list", _help, at_once=True),
    Command("/bye", "", "leave", _bye),
)
COMMANDS = {command.name: command for command in _ALL}

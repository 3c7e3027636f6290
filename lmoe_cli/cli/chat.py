"""`lmoe chat`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output, size
from lmoe_cli.cli.placing import Placing, checked, piped, placed, started
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.chat.events import Answer
    from lmoe_cli.chat.session import Session
    from lmoe_cli.engine.engine import Engine
    from lmoe_cli.findings import Finding
    from lmoe_cli.loadout.loadout import Loadout

F = TypeVar("F", bound=Callable[..., Any])

EMBEDDED = Path(__file__).parents[1] / "chat" / "battlemage.yaml"
"""The loadout that answers where none is named."""
MAX_CHANGES = 5
"""Tokens whose change a person is told."""


def sampling(function: F) -> F:
    """Add an option for every key of a recipe's ``chat:``, and pass those that were given as ``settings``."""

    @click.option("--temperature", type=float, metavar="T", help="Divides the logits; 0 takes the most likely token.")
    @click.option("--top-p", type=float, metavar="P", help="Keep the most likely tokens up to this probability.")
    @click.option("--top-k", type=int, metavar="K", help="Keep this many of the most likely tokens; 0 keeps all.")
    @click.option("--repetition-penalty", type=float, metavar="R", help="Divides the logits of tokens that occurred.")
    @click.option("--max-new-tokens", type=int, metavar="N", help="Longest answer.")
    @click.option("--seed", type=int, metavar="N", help="Makes sampled answers repeatable.")
    @click.option("--system", type=params.TEXT, metavar="TEXT", help="System message that opens the conversation.")
    @click.option(
        "--stop", multiple=True, type=params.TEXT, metavar="TEXT", help="A text that ends an answer; repeatable."
    )
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed", "system", "stop")
        given = {name: value for name in names if (value := kwargs.pop(name)) not in (None, ())}
        return function(*args, settings=given, **kwargs)

    return wrapped  # type: ignore[return-value]


@click.command()
@click.option("--loadout", type=click.Path(path_type=Path), metavar="FILE", help="Recipe; the embedded battle-mage.")
@params.blend
@click.option("--prompt", type=params.TEXT, metavar="TEXT", help="Answer this once; so does text on stdin.")
@click.option("--without", type=params.TEXT, metavar="NAME", help="Answer once without this expert: its weight is 0.")
@sampling
@placed
@click.option("--compile", "compiles", is_flag=True, help="Let torch compile the steps: a late start, faster tokens.")
@params.output
def chat(
    loadout: Path | None,
    blend: params.Blend,
    prompt: str | None,
    without: str | None,
    settings: dict[str, Any],
    placing: Placing,
    compiles: bool,
    out: Output,
) -> None:
    """Talk to a loadout, or answer one prompt.

    With --prompt, or text on stdin, one answer goes to stdout. In a terminal it is a conversation: the weights stay in
    sight and can be turned while the answer comes; /help tells how. --base alone talks to a model without experts.
    """
    chosen = [loadout] if loadout else [] if blend.is_given else [EMBEDDED]
    (request,) = params.requests(chosen, blend)
    text = _prompt(prompt, without, out)
    placing = replace(placing, compiles=compiles, settings=settings)
    found, findings = checked(request, placing)
    if without is not None:
        found.expert(without)
    out.warn(findings)
    session = _session(found, placing, out)
    if text is None:
        _converse(session)
    else:
        _answer(session, text, without, findings, out)


def _prompt(prompt: str | None, without: str | None, out: Output) -> str | None:
    """What to answer once; None for a conversation.

    Raises:
        UsageError: There is nothing to answer.
    """
    if prompt is None and sys.stdin.isatty():
        if out.as_json:
            raise UsageError("usage", "--json answers once", hint="add --prompt TEXT, or pipe a text in")
        if without is not None:
            hint = "add --prompt TEXT, or pipe a text in; /mute NAME does it in a conversation"
            raise UsageError("usage", "--without answers once", hint=hint)
        return None
    text = piped() if prompt is None else prompt
    if not text.strip():
        raise UsageError("prompt-empty", "there is no text to answer", hint="--prompt TEXT, or pipe a text in")
    return text


def _session(found: Loadout, placing: Placing, out: Output) -> Session:
    """Load a loadout and open a conversation with it."""
    from lmoe_cli.chat.session import Outside, Session

    def load(path: Path) -> tuple[Engine, Sequence[Finding]]:
        (request,) = params.requests([path], params.Blend(None, (), ()))
        other, findings = checked(request, placing)
        return started(other, placing, Output(out.command, quiet=True)), findings

    return Session(started(found, placing, out), Outside(load, _bake))


def _bake(found: Loadout, folder: Path, advance: Callable[[int], None], force: bool) -> str:
    from lmoe_cli.bake.model import bake_model

    report = bake_model(found, folder, advance=advance, force=force)
    return f"{folder}: {size(report['bytes'])} in {report['seconds']:.1f} s; lmoe chat --base {folder}"


def _answer(session: Session, text: str, left_out: str | None, findings: Sequence[Finding], out: Output) -> None:
    """Answer once. On a terminal the answer streams; anywhere else it comes whole."""
    from lmoe_cli.chat.session import CONTINUES
    from lmoe_cli.engine.without import without

    engine = session.engine
    if not engine.has_template:
        out.say(CONTINUES)
    names = [left_out] if left_out is not None else []
    if names:
        engine.unfold()  # what follows compares both ways, computed alike
    with without(engine, *names):
        answer = _say(session, text, out)
    timings = answer.timings
    data = {
        "text": answer.text,
        "weights": {**answer.weights, **dict.fromkeys(names, 0.0)},
        "tokens": timings.new_tokens,
        "finish": answer.finish,
        "timings": {**asdict(timings), "tokens_per_s": timings.tokens_per_s},
        "without": None,
    }
    told: tuple[Finding, ...] = ()
    if left_out is not None and not (out.quiet and not out.as_json):
        data["without"], told = _change(session, left_out, out)
    out.finish(data, [*findings, *told])


def _say(session: Session, text: str, out: Output) -> Answer:
    """Print an answer."""
    from lmoe_cli.chat.events import Answer, Note, Text
    from lmoe_cli.chat.lines import printable
    from lmoe_cli.chat.show import status

    streams = sys.stdout.isatty() and not out.as_json
    is_in_line = False
    try:
        for event in session.answer(text):
            match event:
                case Text(piece) if streams:
                    is_in_line = True
                    click.echo(printable(piece), nl=False)
                case Note(note):
                    out.say(note)
                case Answer(answer):
                    is_in_line = False
                    if not out.as_json:
                        click.echo("" if streams else answer)
                    if out.verbose:
                        out.say(status(event))
                    return event
    finally:
        if is_in_line:
            click.echo("")
    raise AssertionError("every answer has an end")


def _change(session: Session, name: str, out: Output) -> tuple[dict[str, Any] | None, tuple[Finding, ...]]:
    """What an expert would have made of the answer; where that cannot be told, the answer stands all the same."""
    from lmoe_cli.chat.changed import changed
    from lmoe_cli.errors import InvalidFileError, is_out_of_memory
    from lmoe_cli.findings import finding

    assert session.generation is not None, "an answer was given"
    try:
        found = changed(session.engine, session.generation, name)
    except (InvalidFileError, RuntimeError, MemoryError) as error:
        if isinstance(error, InvalidFileError):
            told = (finding("change-unknown", name, str(error), error.hint),)
        elif is_out_of_memory(error):
            message = f"not enough memory to compare the answer with what {name} makes of it"
            told = (finding("change-unknown", name, message, "a shorter prompt"),)
        else:
            raise
        out.warn(told)
        return None, told
    if tokens := sorted(found["changes"], key=lambda one: -abs(one["change"])):
        most = ", ".join(f"{one['text']!r} {one['change']:+.2f}" for one in tokens[:MAX_CHANGES])
        mean = f"{found['mean_change']:+.4f} nats per token of this answer"
        out.say(f"log-probabilities with {name}, less those without: {mean}; most at {most}")
    return found, ()


def _converse(session: Session) -> None:
    """Talk until the user leaves."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        from lmoe_cli.chat.plain import converse

        converse(session)
        return
    from platformdirs import user_state_path

    from lmoe_cli.chat.history import History
    from lmoe_cli.chat.repl import Repl

    Repl(session, History(user_state_path("lmoe") / "chat-history")).run()

"""`lmoe chat`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output, size
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import InvalidFileError, UsageError

if TYPE_CHECKING:
    from lmoe_cli.chat.session import Session
    from lmoe_cli.engine.engine import Engine
    from lmoe_cli.findings import Finding
    from lmoe_cli.loadout.loadout import Loadout

F = TypeVar("F", bound=Callable[..., Any])

EMBEDDED = Path(__file__).parents[1] / "chat" / "battlemage.yaml"
"""The loadout that answers where none is named."""
MAX_PROMPT_BYTES = 16 << 20


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


@dataclass(frozen=True)
class Placing:
    """Where and how a loadout is to be loaded, whichever it is."""

    device: str | None
    dtype: str | None
    quantize: str | None
    compiles: bool
    token: str | None
    trust_remote_code: bool
    settings: dict[str, Any]
    """Of the recipe's ``chat:``, given on the command line."""


@click.command()
@click.option("--loadout", type=click.Path(path_type=Path), metavar="FILE", help="Recipe; the embedded battle-mage.")
@params.blend
@click.option("--prompt", type=params.TEXT, metavar="TEXT", help="Answer this once; so does text on stdin.")
@sampling
@click.option("--device", help="cpu, cuda, cuda:1, mps; the best there is when left out.")
@click.option("--dtype", type=click.Choice(params.DTYPES), help="Of the weights.")
@click.option("--quantize", type=click.Choice(["nf4", "int8"]), help="Quantise the base while it loads.")
@click.option("--compile", "compiles", is_flag=True, help="Let torch compile the steps: a late start, faster tokens.")
@params.token
@params.trust_remote_code
@params.output
def chat(
    loadout: Path | None,
    blend: params.Blend,
    prompt: str | None,
    settings: dict[str, Any],
    device: str | None,
    dtype: str | None,
    quantize: str | None,
    compiles: bool,
    token: str | None,
    trust_remote_code: bool,
    out: Output,
) -> None:
    """Talk to a loadout, or answer one prompt.

    With --prompt, or text on stdin, one answer goes to stdout. In a terminal it is a conversation: the weights stay in
    sight and can be turned while the answer comes; /help tells how. --base alone talks to a model without experts.
    """
    chosen = [loadout] if loadout else [] if blend.is_given else [EMBEDDED]
    (request,) = params.requests(chosen, blend)
    text = _prompt(prompt, out)
    placing = Placing(device, dtype, quantize, compiles, token, trust_remote_code, settings)
    found, findings = _checked(request, placing)
    out.warn(findings)
    session = _session(found, placing, out)
    if text is None:
        _converse(session)
    else:
        _answer(session, text, findings, out)


def _prompt(prompt: str | None, out: Output) -> str | None:
    """What to answer once; None for a conversation.

    Raises:
        UsageError: There is nothing to answer.
    """
    if prompt is None and sys.stdin.isatty():
        if out.as_json:
            raise UsageError("usage", "--json answers once", hint="add --prompt TEXT, or pipe a text in")
        return None
    text = _piped() if prompt is None else prompt
    if not text.strip():
        raise UsageError("prompt-empty", "there is no text to answer", hint="--prompt TEXT, or pipe a text in")
    return text


def _piped() -> str:
    from lmoe_cli.files import reading

    with reading(Path("stdin")):
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError("usage", f"more than {MAX_PROMPT_BYTES} bytes on stdin", hint="shorten the text")
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError("usage", f"byte {error.start} of stdin is not UTF-8", hint="convert the text") from error


def _checked(request: params.Request, placing: Placing) -> tuple[Loadout, Sequence[Finding]]:
    """Read a recipe and find its parts, as far as that needs no weights.

    Raises:
        RefusedError: The parts do not fit.
        InvalidFileError: The base has no tokenizer.
    """
    from lmoe_cli.check import require
    from lmoe_cli.loadout.loadout import resolve

    recipe = request.recipe()
    if placing.settings:
        recipe = recipe.model_copy(update={"chat": recipe.chat.with_(**placing.settings)})
    found = resolve(recipe, request.origin, beside=request.beside, token=placing.token)
    findings = require(found, trust_remote_code=placing.trust_remote_code).findings
    for item in findings:
        if item.code == "tokenizer-missing":
            hint = "put the tokenizer files of the original model into its folder"
            raise InvalidFileError(item.code, item.message, hint=hint, where=item.where)
    return found, findings


def _session(found: Loadout, placing: Placing, out: Output) -> Session:
    """Load a loadout and open a conversation with it."""
    from lmoe_cli.chat.session import Outside, Session

    def load(path: Path) -> tuple[Engine, Sequence[Finding]]:
        (request,) = params.requests([path], params.Blend(None, (), ()))
        other, findings = _checked(request, placing)
        return _engine(other, placing, Output(out.command, quiet=True)), findings

    return Session(_engine(found, placing, out), Outside(load, _bake))


def _engine(found: Loadout, placing: Placing, out: Output) -> Engine:
    from lmoe_cli.engine.build import start

    with bar(out, "fetching") as fetched:
        return start(
            found,
            device=placing.device,
            dtype=placing.dtype,
            quantize=placing.quantize,
            compiles=placing.compiles,
            trust_remote_code=placing.trust_remote_code,
            progress=fetched,
        )


def _bake(found: Loadout, folder: Path, advance: Callable[[int], None]) -> str:
    from lmoe_cli.bake.model import bake_model

    report = bake_model(found, folder, advance=advance)
    return f"{folder}: {size(report['bytes'])} in {report['seconds']:.1f} s; lmoe chat --base {folder}"


def _answer(session: Session, text: str, findings: Sequence[Finding], out: Output) -> None:
    """Answer once. On a terminal the answer streams; anywhere else it comes whole."""
    from lmoe_cli.chat.events import Answer, Note, Text
    from lmoe_cli.chat.lines import printable
    from lmoe_cli.chat.session import CONTINUES
    from lmoe_cli.chat.show import status

    if not session.engine.has_template:
        out.say(CONTINUES)
    streams = sys.stdout.isatty() and not out.as_json
    for event in session.answer(text):
        match event:
            case Text(piece) if streams:
                click.echo(printable(piece), nl=False)
            case Note(note):
                out.say(note)
            case Answer(answer, finish, timings, weights):
                if not out.as_json:
                    click.echo("" if streams else answer)
                if out.verbose:
                    out.say(status(event))
                told = {**asdict(timings), "tokens_per_s": timings.tokens_per_s}
                data = {"text": answer, "weights": weights, "tokens": timings.new_tokens, "finish": finish}
                out.finish({**data, "timings": told}, findings)


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

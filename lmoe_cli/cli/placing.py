"""From a request to an engine, for commands that run a loadout."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import InvalidFileError, UsageError

if TYPE_CHECKING:
    from lmoe_cli.engine.engine import Engine
    from lmoe_cli.findings import Finding
    from lmoe_cli.loadout.loadout import Loadout

F = TypeVar("F", bound=Callable[..., Any])
MAX_PROMPT_BYTES = 16 << 20


@dataclass(frozen=True)
class Placing:
    """Where and how a loadout is to be loaded, whichever it is."""

    device: str | None
    dtype: str | None
    quantize: str | None
    token: str | None
    trust_remote_code: bool
    compiles: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the recipe's ``chat:``, given on the command line."""


def placed(function: F) -> F:
    """Add the options that say where and how to load, and pass the `Placing` they make as ``placing``."""

    @click.option("--device", help="cpu, cuda, cuda:1, mps; the best there is when left out.")
    @click.option("--dtype", type=click.Choice(params.DTYPES), help="Of the weights.")
    @click.option("--quantize", type=click.Choice(["nf4", "int8"]), help="Quantise the base while it loads.")
    @params.token
    @params.trust_remote_code
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        device: str | None,
        dtype: str | None,
        quantize: str | None,
        token: str | None,
        trust_remote_code: bool,
        **kwargs: Any,
    ) -> Any:
        placing = Placing(device, dtype, quantize, token, trust_remote_code)
        return function(*args, placing=placing, **kwargs)

    return wrapped  # type: ignore[return-value]


def checked(request: params.Request, placing: Placing) -> tuple[Loadout, Sequence[Finding]]:
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


def started(found: Loadout, placing: Placing, out: Output) -> Engine:
    """Load a loadout that has been checked."""
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


def piped() -> str:
    """The text on stdin.

    Raises:
        UsageError: It is too long, or no text.
    """
    from lmoe_cli.files import reading

    with reading(Path("stdin")):
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError("usage", f"more than {MAX_PROMPT_BYTES} bytes on stdin", hint="shorten the text")
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError("usage", f"byte {error.start} of stdin is not UTF-8", hint="convert the text") from error

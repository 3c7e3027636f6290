"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lmoe_cli.cli.output import Output
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.loadout.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "float16", "bfloat16")
"""Those of a recipe, without loading what reads recipes."""


def output(function: F) -> F:
    """Add ``--json -q -v --debug`` and pass the `Output` they make as ``out``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No talk on stderr.")
    @click.option("-v", "--verbose", is_flag=True, help="More talk on stderr.")
    @click.option("--debug", is_flag=True, help="Show the trace of an error.")
    @click.pass_context
    @functools.wraps(function)
    def wrapped(
        ctx: click.Context, /, *args: Any, as_json: bool, quiet: bool, verbose: bool, debug: bool, **kwargs: Any
    ) -> Any:
        del debug  # `main` looks for it, because it concerns errors of every command
        names = ctx.command_path.split()
        return function(*args, out=Output(names[1], as_json, quiet, verbose), **kwargs)

    return wrapped  # type: ignore[return-value]


class Text(click.ParamType):  # type: ignore[type-arg]
    """Words for a model, a file or the Hub, which are Unicode; arguments of a process are bytes that may not be."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self.fail(f"character {error.start + 1} of '{text}' is not UTF-8", param, ctx)
        return text


class Real(click.FloatRange):
    """Numbers of a range. NaN, which is in every range of click's, is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


TEXT = Text()
SEED = click.IntRange(0, 1 << 31, max_open=True)
revision = click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository.")
token = click.option("--token", metavar="TOKEN", help="Hub token; the stored one when left out.")
force = click.option("--force", is_flag=True, help="Replace what stands there.")
trust_remote_code = click.option("--trust-remote-code", is_flag=True, help="Let the base run code of its repository.")


@dataclass(frozen=True)
class Blend:
    """A loadout given on the command line instead of in a file."""

    base: str | None
    experts: tuple[str, ...]
    accept_base: tuple[str, ...]

    @property
    def is_given(self) -> bool:
        return bool(self.base or self.experts)


def blend(function: F) -> F:
    """Add ``--base --expert --accept-base`` and pass the `Blend` they make as ``blend``."""

    @click.option("--base", type=TEXT, metavar="REF", help="Base model, for a blend without a recipe.")
    @click.option(
        "--expert", "experts", multiple=True, type=TEXT, metavar="NAME=REF[:WEIGHT]", help="An expert on --base."
    )
    @click.option(
        "--accept-base", multiple=True, type=TEXT, metavar="NAME", help="Accept experts trained on this other base."
    )
    @functools.wraps(function)
    def wrapped(
        *args: Any, base: str | None, experts: tuple[str, ...], accept_base: tuple[str, ...], **kwargs: Any
    ) -> Any:
        return function(*args, blend=Blend(base, experts, accept_base), **kwargs)

    return wrapped  # type: ignore[return-value]


@dataclass(frozen=True)
class Request:
    """A loadout that was asked for, by file or by words."""

    origin: str
    beside: Path | None
    recipe: Callable[[], Recipe]
    """Reads it; may refuse."""


def requests(recipes: Sequence[Path], blend: Blend) -> list[Request]:
    """The loadouts that a command was asked for.

    Raises:
        UsageError: None, or a file and a blend at once.
    """
    if recipes and blend.is_given:
        raise UsageError(
            "usage", "a recipe and --base/--expert exclude each other", hint="put the experts into the file"
        )
    if blend.accept_base and not blend.experts:
        hint = "in a recipe an expert has 'accept_base'"
        raise UsageError("usage", "--accept-base goes with --base and --expert", hint=hint)
    if blend.is_given:
        return [Request("the command line", None, lambda: _spoken(blend))]
    if not recipes:
        raise UsageError("usage", "no recipe given", hint="name a file, or --base REF --expert NAME=REF[:WEIGHT]")
    return [_from_file(path) for path in recipes]


def _from_file(path: Path) -> Request:
    from lmoe_cli.loadout.parse import read_recipe

    return Request(str(path), path.parent, lambda: read_recipe(path))


def _spoken(blend: Blend) -> Recipe:
    """The recipe that ``--base`` and ``--expert`` say."""
    from lmoe_cli.loadout.parse import parse_recipe
    from lmoe_cli.loadout.text import Document, Place

    if not blend.base:
        raise UsageError("usage", "--expert needs a --base", hint="--base REF")
    experts: dict[str, Any] = {}
    for spoken in blend.experts:
        name, equals, rest = spoken.partition("=")
        if not equals or not rest:
            raise UsageError("usage", f"--expert {spoken}: not NAME=REF[:WEIGHT]", hint="--expert mage=demo:mage:0.3")
        if name in experts:
            raise UsageError("usage", f"--expert {name} stands twice", hint="give each expert its own name")
        ref, colon, last = rest.rpartition(":")
        weight = _number(last) if colon and ref else None
        experts[name] = {"adapter": rest} if weight is None else {"adapter": ref, "weight": weight}
        if blend.accept_base:
            experts[name]["accept_base"] = list(blend.accept_base)
    data = {"version": 1, "base": blend.base, "experts": experts}
    return parse_recipe(Document("the command line", data, {}, {(): Place(1, 1)}))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def expert_name(ref: str, taken: Collection[str]) -> str:
    """A short name for an expert that nobody named, from its reference and not used yet."""
    last = ref.removeprefix("demo:").partition("@")[0].rstrip("/").rpartition("/")[2]
    bare = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_")[:32] or "expert"
    bare = bare if bare[0].isalpha() else f"expert-{bare}"
    return next(name for name in [bare, *(f"{bare}-{number}" for number in range(2, 1000))] if name not in taken)

"""What `lmoe bake` writes of a recipe whose router decides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import InvalidFileError, UsageError

if TYPE_CHECKING:
    from lmoe_cli.bake.divergence import Divergence
    from lmoe_cli.bake.routed import Case, Means
    from lmoe_cli.engine.engine import Engine
    from lmoe_cli.loadout.loadout import Loadout

F = TypeVar("F", bound=Callable[..., Any])
HALF = 0.5
"""Of a file that names no split, how much is held out."""


@dataclass(frozen=True)
class Asked:
    """In what a router shall be turned."""

    mean_gates: bool
    data: Path | None
    records: int
    prompt: str | None
    recipe: Path | None
    """Where to write the result as a recipe."""


def options(function: F) -> F:
    """Add ``--mean-gates --data --records --prompt --save-recipe`` and pass the `Asked` they make as ``asked``."""

    @click.option("--mean-gates", is_flag=True, help="Of a router that decides: bake the mean of its gates on --data.")
    @click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="JSONL to measure gates and loss on.")
    @click.option(
        "--records", type=click.IntRange(1), default=256, show_default=True, help="Most records of each half of --data."
    )
    @click.option(
        "--prompt", type=params.TEXT, metavar="TEXT", help="Of a router that reads prompts: bake the blend of this one."
    )
    @click.option(
        "--save-recipe", type=click.Path(path_type=Path), metavar="FILE", help="Write the blend that is baked, too."
    )
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        mean_gates: bool,
        data: Path | None,
        records: int,
        prompt: str | None,
        save_recipe: Path | None,
        **kwargs: Any,
    ) -> Any:
        return function(*args, asked=Asked(mean_gates, data, records, prompt, save_recipe), **kwargs)

    return wrapped  # type: ignore[return-value]


def require_asked(loadout: Loadout, asked: Asked, *, force: bool) -> None:
    """Refuse what does not go together, before anything is computed.

    Raises:
        UsageError: The router decides and nobody said what to bake of it, or the other way round.
    """
    from lmoe_cli.files import refuse_existing_file
    from lmoe_cli.loadout.about_router import require_fixed

    router = loadout.recipe.router
    if asked.mean_gates != (asked.data is not None):
        raise UsageError("usage", "--mean-gates and --data go together", hint="--mean-gates --data FILE")
    if asked.mean_gates and asked.prompt is not None:
        raise UsageError("usage", "--prompt and --mean-gates exclude each other", hint="leave one of them out")
    is_asked = asked.mean_gates or asked.prompt is not None
    if is_asked and router.scope == "fixed":
        message = f"{loadout.origin}: the router '{router.type}' has fixed weights, which are baked as they are"
        raise UsageError("usage", message, hint="leave out --mean-gates and --prompt")
    if asked.prompt is not None and router.scope != "prompt":
        message = f"the router '{router.type}' decides per token, whatever the prompt"
        raise UsageError("usage", message, hint="--mean-gates --data FILE")
    if asked.recipe and not is_asked:
        hint = "leave it out: the recipe says it already"
        raise UsageError("usage", "--save-recipe goes with --mean-gates or --prompt", hint=hint)
    if asked.recipe:
        refuse_existing_file(asked.recipe, force=force)
    if not is_asked:
        require_fixed(loadout)


def fixed(out: Output, loadout: Loadout, asked: Asked, *, trust_remote_code: bool) -> tuple[Loadout, Mapping[str, Any]]:
    """The loadout with fixed weights in place of its router, and what the report shall tell of them.

    Raises:
        LmoeError: The data cannot be read, or the base cannot be run.
    """
    if loadout.recipe.router.scope == "fixed":
        return loadout, {}
    from lmoe_cli.bake.routed import measure, of_prompt, with_means
    from lmoe_cli.engine.build import start

    engine = start(loadout, trust_remote_code=trust_remote_code, answers=False)
    told: dict[str, Any] = {"router": loadout.recipe.router.model_dump(mode="json", exclude_defaults=True)}
    if asked.prompt is not None:
        found = of_prompt(engine, asked.prompt)
        weights = engine.bank.gates.values[0].tolist()
        gates = dict(zip(engine.bank.names, weights, strict=True))
        out.say("the blend of the prompt: " + ", ".join(f"{name} {gate:.3g}" for name, gate in gates.items()))
        return found, {**told, "prompt": asked.prompt, "gates": gates}
    assert asked.data is not None, "it was asked for"
    cases = _Cases(engine, asked.data, asked.records)
    with bar(out, "measuring gates", counts=True) as drawn:
        means = measure(engine, _counted(cases.read("train"), drawn, asked.records))
    found = with_means(engine, means.gates)
    from lmoe_cli.bake import divergence

    with bar(out, "measuring what is lost", counts=True) as drawn:
        lost = divergence.measure(engine, found, _counted(cases.read("valid"), drawn, asked.records))
    _show(out, lost)
    return found, {**told, **_facts(asked.data, engine, means, lost)}


def save_recipe(out: Output, loadout: Loadout, path: Path, *, force: bool) -> None:
    """Write what was baked as a recipe."""
    from lmoe_cli.files import write_file
    from lmoe_cli.loadout.write import moved, recipe_text

    write_file(path, recipe_text(moved(loadout, path.parent)).encode(), force=force)
    out.say(f"{path}: the same blend as a recipe")


class _Cases:
    """Records of both halves of a data file, as tokens."""

    def __init__(self, engine: Engine, path: Path, most: int) -> None:
        from lmoe_cli.data.examples import Encoder
        from lmoe_cli.data.records import read_records

        self._path, self._most = path, most
        self._encoder = Encoder(engine.tokenizer, engine.context)
        self._fraction = 0.0 if any(record.split == "valid" for record in read_records(path)) else HALF

    def read(self, split: str) -> Iterator[Case]:
        from lmoe_cli.data.records import read_records
        from lmoe_cli.data.splits import of_split, require_some

        records, is_empty = of_split(read_records(self._path), split, fraction=self._fraction), True
        for record in islice(require_some(records, self._path, split), self._most):
            if (example := self._encoder.encode(record)) is not None:
                is_empty = False
                yield record, example
        if is_empty:
            message = f"{self._path}: no record of the split '{split}' says anything within the base's context"
            raise InvalidFileError("data-empty", message, hint="shorter records", where=str(self._path))


def _counted(cases: Iterator[Case], drawn: Any, most: int) -> Iterator[Case]:
    drawn.start("", most)
    for case in cases:
        yield case
        drawn.advance(1)


def _show(out: Output, lost: Divergence) -> None:
    """What each fixed blend loses of the routed model."""
    best = lost.best_single
    rows = [(name, f"{nats:.4f}") for name, nats in lost.nats.items()]
    for name, nats in lost.single.items():
        rows.append((f"{name} alone" + (", the best of them" if name == best else ""), f"{nats:.4f}"))
    title = f"KL divergence to the routed model, on {lost.tokens} held-out tokens"
    out.table(title, ("fixed blend", "nats per token"), sorted(rows, key=lambda row: float(row[1])))


def _facts(path: Path, engine: Engine, means: Means, lost: Divergence) -> dict[str, Any]:
    from lmoe_cli.data.records import data_hash

    names = engine.bank.names
    return {
        "data": {
            "file": path.name,
            "sha256": data_hash(path),
            "measured": {"records": means.records, "tokens": means.tokens},
            "held_out": {"records": lost.records, "tokens": lost.tokens},
        },
        "mean_gates": {place: dict(zip(names, gates, strict=True)) for place, gates in means.gates.items()},
        "unseen": list(means.unseen),
        "kl": {**lost.nats, "single": dict(lost.single), "best_single": lost.best_single},
    }

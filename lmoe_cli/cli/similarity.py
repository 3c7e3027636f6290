"""`lmoe similarity`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.similarity.plan import Plan

MAX_SQUARE, MAX_PAIRS = 8, 20
"""Adapters that a square table of all of them has room for, and pairs that a person is shown."""
MAX_COLUMNS = 6
"""Pairs that get a column each in a table of layers."""


@click.command()
@click.argument("refs", nargs=-1, type=params.TEXT, metavar="REF…")
@click.option("--loadout", type=click.Path(path_type=Path), metavar="FILE", help="Compare the experts of this recipe.")
@click.option("--base", type=params.TEXT, metavar="REF", help="The adapters' base: compare whole deltas.")
@click.option(
    "--accept-base", multiple=True, type=params.TEXT, metavar="NAME", help="Accept adapters trained on this other base."
)
@click.option("--html", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with heat maps.")
@params.force
@params.token
@params.output
def similarity(
    refs: tuple[str, ...],
    loadout: Path | None,
    base: str | None,
    accept_base: tuple[str, ...],
    file: Path | None,
    force: bool,
    token: str | None,
    out: Output,
) -> None:
    """Compare the deltas of adapters.

    Tells norms, cosines and how far the subspaces overlap that the deltas read and write: overall, by layer and by
    kind of module. REF is what `lmoe inspect adapter` takes, or NAME=REF to give it a name; two at least.

    It is computed from the factors, one module at a time. Modules that only one of two adapters changes count as zero
    in the other. What has the base's weights in its delta (DoRA, IA3, modules saved whole) is compared whole only with
    --base or --loadout; a recipe's weights do not count.
    """
    from lmoe_cli.files import refuse_existing_file, write_file

    if file:
        refuse_existing_file(file, force=force)
    plan = _plan(refs, loadout, base, accept_base, token)
    out.warn(plan.findings)
    with bar(out, "fetching") as fetched:
        plan = plan.fetched(fetched)
    from lmoe_cli.similarity.compare import compare
    from lmoe_cli.similarity.page import page
    from lmoe_cli.similarity.report import report

    with bar(out, "comparing") as drawn:
        drawn.start("", sum(changed.size for changed in plan.matrices))
        data = report(plan, compare(plan, drawn.advance))
    if file:
        write_file(file, page(data, plan.findings).encode(), force=force)
        out.say(f"{file}: written")
    _show(out, data)
    out.finish(data | {"html": str(file) if file else None}, plan.findings)


def _plan(
    refs: tuple[str, ...], file: Path | None, base: str | None, accept_base: tuple[str, ...], token: str | None
) -> Plan:
    """What was asked for, read from headers.

    Raises:
        UsageError: Fewer than two adapters, or arguments that exclude each other.
    """
    if file and (refs or base or accept_base):
        message = "--loadout excludes REF, --base and --accept-base"
        raise UsageError("usage", message, hint="put the adapters into the file")
    if accept_base and not base:
        raise UsageError("usage", "--accept-base goes with --base", hint="--base REF")
    named = {} if file else _names(refs)
    if not file and len(named) < 2:
        hint = "lmoe similarity REF REF, or --loadout RECIPE"
        raise UsageError("usage", f"{len(named)} adapters to compare, two at least", hint=hint)
    from lmoe_cli.similarity.plan import by_name, on_base, read_experts

    if not file and not base:
        return by_name(read_experts(named, token))
    from lmoe_cli.loadout.loadout import resolve

    blend = params.Blend(base, tuple(f"{name}={ref}:1" for name, ref in named.items()), accept_base)
    (request,) = params.requests([file] if file else [], blend)
    recipe = request.recipe()
    if len(recipe.experts) < 2:
        message = f"{request.origin}: {len(recipe.experts)} experts to compare, two at least"
        raise UsageError("usage", message, hint="name adapters: lmoe similarity REF REF")
    return on_base(resolve(recipe, request.origin, beside=request.beside, token=token))


def _names(refs: Sequence[str]) -> dict[str, str]:
    """Name → reference, of ``NAME=REF`` as written, else after the reference."""
    named: dict[str, str] = {}
    for text in refs:
        name, equals, ref = text.partition("=")
        if not equals or not ref or set(name) & set("/:@~.") or _is_folder(text):
            named[params.expert_name(text, named)] = text
        elif name in named:
            raise UsageError("usage", f"{text}: two adapters are called {name}", hint="give each its own name")
        else:
            named[name] = ref
    return named


def _is_folder(text: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(text).is_dir()
    return False


def _show(out: Output, data: dict[str, Any]) -> None:
    """Print a comparison for a person."""
    if out.as_json:
        return
    names, overall = list(data["adapters"]), data["overall"]
    rows = [
        (name, facts["ref"], facts["peft_type"], _rank(facts["rank"]), facts["modules"], _number(facts["norm"]))
        for name, facts in data["adapters"].items()
    ]
    out.table("", ("", "adapter", "type", "rank", "modules", "norm"), rows)
    if 2 < len(names) <= MAX_SQUARE:
        out.table("cosine", ("", *names), _square(names, overall["pairs"]))
    _show_pairs(out, overall["pairs"])
    for title, label, groups in (("by kind of module", "kind", "kinds"), ("by layer", "layer", "layers")):
        _show_groups(out, title, label, data[groups], names)


def _square(names: Sequence[str], pairs: Sequence[dict[str, Any]]) -> list[list[str | None]]:
    cosines = {frozenset((pair["first"], pair["second"])): pair["cosine"] for pair in pairs}
    return [
        [first, *("1" if first == second else _number(cosines[frozenset((first, second))]) for second in names)]
        for first in names
    ]


def _show_pairs(out: Output, pairs: Sequence[dict[str, Any]]) -> None:
    nearest = sorted(pairs, key=lambda pair: -abs(pair["cosine"] or 0.0))[:MAX_PAIRS]
    rows = [
        (
            f"{pair['first']} · {pair['second']}",
            _number(pair["cosine"]),
            _number(pair["cosine_shared"]),
            pair["shared"],
            *(_with_chance(pair, side) for side in ("input", "output")),
        )
        for pair in nearest
    ]
    columns = ("pair", "cosine", "of shared modules", "shared", "overlap, input (chance)", "overlap, output (chance)")
    out.table("", columns, rows)
    if len(pairs) > MAX_PAIRS:
        out.say(f"and {len(pairs) - MAX_PAIRS} more pairs; --json tells all")


def _with_chance(pair: dict[str, Any], side: str) -> str | None:
    overlap = _number(pair[f"overlap_{side}"])
    return overlap and f"{overlap} ({_number(pair[f'chance_{side}'])})"


def _show_groups(out: Output, title: str, label: str, groups: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A row per group: norms and cosines, or where there are many pairs the lowest, mean and highest cosine."""
    pairs = groups[0]["pairs"]
    if len(pairs) > MAX_COLUMNS:
        columns = [label, "modules", "lowest cosine", "mean", "highest"]
        rows = [[_label(group[label]), group["matrices"], *_spread(group["pairs"])] for group in groups]
    elif len(pairs) == 1:
        columns = [label, *(f"norm, {name}" for name in names), "cosine", "overlap, input", "overlap, output"]
        rows = [
            [_label(group[label]), *_norms(group, names), *(_number(group["pairs"][0][key]) for key in
             ("cosine", "overlap_input", "overlap_output"))]
            for group in groups
        ]  # fmt: skip
    else:
        columns = [label, *(f"norm, {name}" for name in names), *(f"{one['first']} · {one['second']}" for one in pairs)]
        rows = [
            [_label(group[label]), *_norms(group, names), *(_number(pair["cosine"]) for pair in group["pairs"])]
            for group in groups
        ]
    out.table(title, columns, rows)


def _norms(group: dict[str, Any], names: Sequence[str]) -> list[str | None]:
    return [_number(group["norms"][name]) for name in names]


def _spread(pairs: Sequence[dict[str, Any]]) -> list[str | None]:
    cosines = [pair["cosine"] for pair in pairs if pair["cosine"] is not None]
    if not cosines:
        return [None, None, None]
    return [_number(value) for value in (min(cosines), sum(cosines) / len(cosines), max(cosines))]


def _label(value: Any) -> Any:
    return "none" if value is None else value


def _rank(rank: dict[str, int | None]) -> Any:
    return rank["max"] if rank["min"] == rank["max"] else f"{rank['min']} to {rank['max']}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}" if abs(value) >= 0.0005 or value == 0 else f"{value:.0e}"

"""`lmoe fit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.judged import cut_at, encoder_of, named_files, require_readable
from lmoe_cli.cli.output import Output
from lmoe_cli.cli.placing import Placing, checked, placed
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import UsageError

LIMIT = 1000
"""Records of each file that are read, unless more are asked for: a few numbers need few records."""


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data",
    "files",
    multiple=True,
    type=params.TEXT,
    metavar="[NAME=]FILE",
    help="JSONL to suit; each counts the same.",
)
@click.option(
    "--out", "target", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The recipe to write."
)
@click.option("--groups", type=click.IntRange(1, 512), metavar="N", help="Weights of their own for N groups of layers.")
@click.option("--steps", type=click.IntRange(1, 100_000), default=100, show_default=True, help="Of AdamW.")
@click.option(
    "--rate",
    type=params.Real(0, 10, min_open=True),
    default=0.05,
    show_default=True,
    help="About the first step's length.",
)
@click.option(
    "--held-out",
    type=params.Real(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share kept to judge by, where lines have no `split`.",
)
@click.option(
    "--limit", type=click.IntRange(1), default=LIMIT, show_default=True, help="Records of each file and side."
)
@cut_at
@click.option(
    "--seed",
    type=params.SEED,
    default=0,
    show_default=True,
    help="Of what is kept, and of the order.",
)
@params.force
@placed
@params.blend
@params.output
def fit(
    recipe: Path | None,
    files: tuple[str, ...],
    target: Path,
    groups: int | None,
    steps: int,
    rate: float,
    held_out: float,
    limit: int,
    max_tokens: int | None,
    seed: int,
    force: bool,
    placing: Placing,
    blend: params.Blend,
    out: Output,
) -> None:
    """Find the fixed weights that suit some data, and write them as a recipe.

    One number per expert, or with --groups one per expert and group of layers, by the gradient of the loss; base and
    experts stay as they are. Records whose `split` is `valid` are not used, but judged by at the end; without such a
    field --held-out are.
    """
    from lmoe_cli.files import refuse_existing_file, write_file

    data = named_files(files, "--data")
    if not data:
        raise UsageError("usage", "nothing to suit", hint="--data NAME=FILE, a JSONL file")
    refuse_existing_file(target, force=force)
    (request,) = params.requests([recipe] if recipe else [], blend)
    loadout, findings = checked(request, placing)
    out.warn(findings)
    if not loadout.experts:
        raise UsageError("usage", f"{request.origin}: there is no expert to weigh", hint="put experts into the recipe")
    for path in data.values():
        require_readable(path)

    from lmoe_cli.evaluate import groups as parted
    from lmoe_cli.evaluate.fit import Schedule
    from lmoe_cli.evaluate.fit import fit as find
    from lmoe_cli.evaluate.fitted import about_fit, judged, losses, read_sides
    from lmoe_cli.evaluate.report import facts, remarks
    from lmoe_cli.evaluate.variants import Variant, open_stage
    from lmoe_cli.loadout.write import moved, recipe_text

    plain = loadout.published
    split = parted.split(plain, parted.layer_groups(plain, groups) if groups else [])
    start = parted.starts(loadout, split)
    if loadout.recipe.router.scope != "fixed":
        start = [1 / len(loadout.experts)] * len(start)
    names = [expert.name for expert in split.loadout.experts]
    with bar(out, "fetching") as fetched:
        stage = open_stage(
            [Variant("start", "recipe", split.loadout, dict(zip(names, start, strict=True)))],
            device=placing.device, dtype=placing.dtype, quantize=placing.quantize,
            trust_remote_code=placing.trust_remote_code, progress=fetched,
        )  # fmt: skip
    engine = stage.engine
    sides = read_sides(
        data, encoder_of(engine, max_tokens, "truncate"), engine.decode, held_out=held_out, limit=limit, seed=seed
    )
    before = [judged(engine, dict(zip(names, start, strict=True)), side) for side in sides]
    with bar(out, "fitting", counts=True) as drawn:
        drawn.start("", steps)
        found = find(engine, sides[0], start, Schedule(steps, rate, seed), drawn.advance)
    after = [judged(engine, dict(zip(names, found, strict=True)), side) for side in sides]
    train = losses(before[0], after[0], sides[0], seed)
    kept = losses(before[1], after[1], sides[1], seed) if sides[1] else None
    told = [*remarks(sides[0], "fixed"), *about_fit(kept, str(target))]
    out.warn(told)
    weights = parted.weights_of(split.parts, found)
    written = moved(loadout.live, target.parent)
    entries = {name: entry.model_copy(update={"weight": weights[name]}) for name, entry in written.experts.items()}
    write_file(target, recipe_text(written.model_copy(update={"experts": entries})).encode(), force=force)
    parts = [
        {"expert": name, "match": None if pattern == parted.REST else pattern, "start": before_, "found": after_}
        for (name, pattern), before_, after_ in zip(split.parts, start, found, strict=True)
    ]
    _show(out, parts, {"fitted on": train, "held out": kept})
    out.say(f"{target}: written; next: lmoe eval {quote(str(target))} --data …")
    settings = {
        "groups": groups, "steps": steps, "rate": rate, "held_out": held_out, "limit": limit, "seed": seed,
    }  # fmt: skip
    facts_ = {"train": [facts(domain) for domain in sides[0]], "held_out": [facts(domain) for domain in sides[1]]}
    loss = {"train": train, "held_out": kept}
    out.finish(
        {
            "recipe": request.origin, "out": str(target), "weights": parts, "nats_per_token": loss, "data": facts_,
            "settings": settings,
        },
        [*findings, *told],
    )  # fmt: skip


def _show(out: Output, parts: Sequence[dict[str, Any]], loss: dict[str, Any]) -> None:
    has_groups = any(part["match"] for part in parts)
    rows = [
        [
            part["expert"],
            *([part["match"] or "elsewhere"] if has_groups else []),
            f"{part['start']:.3g}",
            f"{part['found']:.4g}",
        ]
        for part in parts
    ]
    out.table("weights", ("expert", *(["layers"] if has_groups else []), "before", "found"), rows)
    sides = [
        (name, one["records"], f"{one['start']:.4f}", f"{one['found']:.4f}", _between(one["difference"]))
        for name, one in loss.items()
        if one
    ]
    out.table("nats per token", ("", "records", "before", "after", "difference, 95 %"), sides)


def _between(difference: dict[str, Any]) -> str:
    told = f"{difference['value']:+.4f}"
    return told if difference["low"] is None else f"{told} ({difference['low']:+.4f} to {difference['high']:+.4f})"

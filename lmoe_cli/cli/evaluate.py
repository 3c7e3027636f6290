"""`lmoe eval`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.evaluated import show
from lmoe_cli.cli.judged import Judged, cut_at, named_files, require_readable
from lmoe_cli.cli.output import Output, show_findings
from lmoe_cli.cli.placing import Placing, checked, placed
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.data.examples import TooLong
    from lmoe_cli.evaluate.baseline import Baseline
    from lmoe_cli.evaluate.variants import Stage, Variant
    from lmoe_cli.findings import Finding
    from lmoe_cli.loadout.loadout import Loadout

TOO_LONG = ("truncate", "skip", "error")
SPLITS = ("train", "valid", "test", "all")


@click.command("eval")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data", "files", multiple=True, type=params.TEXT, metavar="[NAME=]FILE", help="JSONL to judge by; one per domain."
)
@click.option("--split", type=click.Choice(SPLITS), help="Records of it; `valid` where lines say theirs, else all.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N records of each file.")
@cut_at
@click.option(
    "--too-long",
    type=click.Choice(TOO_LONG),
    default="truncate",
    show_default=True,
    help="What to do with longer records.",
)
@click.option("--generate", "generates", is_flag=True, help="Also answer every conversation: exact match.")
@click.option(
    "--select", multiple=True, type=params.TEXT, metavar="[NAME=]FILE", help="Choose the best single expert on this."
)
@click.option("--without", multiple=True, type=params.TEXT, metavar="NAME", help="Also the recipe without this expert.")
@click.option("--no-random", is_flag=True, help="Leave out the control of random experts.")
@click.option(
    "--retrain",
    multiple=True,
    type=params.TEXT,
    metavar="FILE",
    help="Also one LoRA of all experts' size, trained on this now.",
)
@click.option(
    "--retrain-epochs",
    type=params.Real(0, 10_000, min_open=True),
    help="Passes over it; 3.",
)
@click.option(
    "--retrain-rate",
    type=params.Real(0, 1, min_open=True),
    help="Learning rate; 2e-4.",
)
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE", help="An earlier --json of the same data.")
@click.option("--max-regression", type=float, metavar="NATS", help="More loss per token than that exits with 1; 0.01.")
@click.option(
    "--task", "tasks", multiple=True, type=params.TEXT, metavar="NAME", help="A task of lm-eval; extra [eval]."
)
@click.option("--include-path", type=click.Path(path_type=Path), metavar="DIR", help="A folder with tasks of your own.")
@click.option(
    "--resamples", type=click.IntRange(100, 100_000), default=1000, show_default=True, help="Draws of the bootstrap."
)
@click.option(
    "--seed",
    type=params.SEED,
    default=0,
    show_default=True,
    help="Of draws, random experts and what is retrained.",
)
@click.option("--html", "page", type=click.Path(path_type=Path), metavar="FILE", help="Write a page.")
@params.force
@placed
@params.blend
@params.output
def evaluate(
    recipe: Path | None,
    files: tuple[str, ...],
    split: str | None,
    limit: int | None,
    max_tokens: int | None,
    too_long: TooLong,
    generates: bool,
    select: tuple[str, ...],
    without: tuple[str, ...],
    no_random: bool,
    retrain: tuple[str, ...],
    retrain_epochs: float | None,
    retrain_rate: float | None,
    baseline: Path | None,
    max_regression: float | None,
    tasks: tuple[str, ...],
    include_path: Path | None,
    resamples: int,
    seed: int,
    page: Path | None,
    force: bool,
    placing: Placing,
    blend: params.Blend,
    out: Output,
) -> None:
    """Judge a recipe on held-out data, beside the base, its experts and controls.

    Loss in nats per token and bits per byte, over what the assistant says, or all of a text; for the base, each expert
    alone, all of them evenly, the recipe as written, the best single expert per domain, and random experts of the same
    size. All on one loaded base, with 95 % intervals of the difference to the recipe by a bootstrap over records.
    """
    judged = Judged(named_files(files, "--data"), named_files(select, "--select"), split, limit, max_tokens, too_long)
    if not retrain and (retrain_epochs or retrain_rate):
        raise UsageError("usage", "--retrain-epochs and --retrain-rate go with --retrain", hint="--retrain FILE")
    _require_sense(judged, tasks, baseline, max_regression, include_path, generates=generates)
    from lmoe_cli.evaluate.baseline import read_baseline
    from lmoe_cli.files import refuse_existing_file, write_file

    if page:
        refuse_existing_file(page, force=force)
    (request,) = params.requests([recipe] if recipe else [], blend)
    loadout, checks = checked(request, placing)
    out.warn(checks)
    before = read_baseline(baseline) if baseline else None
    for path in (*judged.data.values(), *judged.select.values()):
        require_readable(path)

    from lmoe_cli.cli.retrain import control
    from lmoe_cli.data.records import data_hash
    from lmoe_cli.evaluate.page import page as made
    from lmoe_cli.evaluate.variants import open_stage, other, plan

    if before:
        before.require_files({name: data_hash(path) for name, path in judged.data.items()})
    data: dict[str, Any] = {
        "recipe": request.origin,
        "name": loadout.recipe.name,
        "base": loadout.base.ref,
        "router": loadout.recipe.router.type,
        "experts": [expert.name for expert in loadout.experts],
        "domains": {}, "variants": [], "without": {}, "oracle": None, "retrained": None, "tasks": None,
        "baseline": None,
        "settings": {
            "split": split, "limit": limit, "max_tokens": max_tokens, "too_long": too_long, "generate": generates,
            "resamples": resamples, "seed": seed, "random": not no_random, "quantize": placing.quantize,
        },
    }  # fmt: skip
    new = [Path(text) for text in retrain]
    variants = plan(loadout, without=without, seed=None if no_random else seed)
    suites = _suites(tasks, include_path, variants)
    with control(new, judged, loadout, retrain_epochs or 3.0, retrain_rate or 2e-4, seed, placing, out) as made_anew:
        data["retrained"] = made_anew.facts
        variants += [other(name, anew) for name, anew in made_anew.others.items()]
        with bar(out, "fetching") as fetched:
            stage = open_stage(
                variants, device=placing.device, dtype=placing.dtype, quantize=placing.quantize,
            trust_remote_code=placing.trust_remote_code,
                progress=fetched,
            )  # fmt: skip
        data["settings"]["dtype"] = str(next(stage.model.parameters()).dtype).removeprefix("torch.")
        told = _judge(data, stage, loadout, variants, judged, generates=generates, out=out) if judged.data else []
        if suites:
            data["tasks"] = suites.run(stage, variants, limit=limit, seed=seed, say=out.say)
    out.warn(told)
    regressions = _against(data, before, max_regression)
    findings = [*checks, *made_anew.findings, *told, *regressions]
    if page:
        write_file(page, made(data, findings).encode(), force=force)
        out.say(f"{page}: written")
    show(out, data)
    if regressions and not out.as_json:
        show_findings(regressions)
    out.finish(data | {"html": str(page) if page else None}, findings, ok=not regressions)
    if regressions:
        raise click.exceptions.Exit(1)


def _require_sense(
    judged: Judged,
    tasks: Sequence[str],
    baseline: Path | None,
    most: float | None,
    include: Path | None,
    *,
    generates: bool,
) -> None:
    """Refuse arguments that do not go together.

    Raises:
        UsageError: They do not.
    """
    if not judged.data and not tasks:
        raise UsageError("usage", "nothing to judge by", hint="--data NAME=FILE, a JSONL file; or --task NAME")
    if judged.select and judged.select.keys() != judged.data.keys():
        odd = min(judged.select.keys() ^ judged.data.keys())
        message = f"--select is for the domains of --data, one by one: '{odd}' has only one of the two"
        raise UsageError("usage", message, hint="--data NAME=FILE --select NAME=OTHER")
    if most is not None and not baseline:
        raise UsageError("usage", "--max-regression goes with --baseline", hint="--baseline FILE")
    if most is not None and not 0 <= most < float("inf"):
        raise UsageError("usage", f"--max-regression {most}: not a number of nats", hint="such as 0.01")
    if (baseline or generates) and not judged.data:
        raise UsageError("usage", "--baseline and --generate are for --data", hint="--data NAME=FILE")
    if include and not tasks:
        raise UsageError("usage", "--include-path goes with --task", hint="--task NAME")


def _suites(tasks: Sequence[str], include: Path | None, variants: Sequence[Variant]) -> Any:
    if not tasks:
        return None
    from lmoe_cli.evaluate.suites import Suites, require_fixed_or_token

    require_fixed_or_token(variants)
    return Suites(tasks, include)


def _judge(
    data: dict[str, Any],
    stage: Stage,
    loadout: Loadout,
    variants: Sequence[Variant],
    judged: Judged,
    *,
    generates: bool,
    out: Output,
) -> list[Finding]:
    """Fill in what the data says of every variant."""
    from lmoe_cli.engine.trace import texts
    from lmoe_cli.evaluate.changes import changes
    from lmoe_cli.evaluate.measure import best_single, measure, work
    from lmoe_cli.evaluate.report import facts, remarks, report
    from lmoe_cli.evaluate.seen import about_seen

    domains, select = judged.read(stage, judged.data), judged.read(stage, judged.select)
    single = [variant for variant in variants if variant.kind == "expert"]
    with bar(out, "judging", counts=True) as drawn:
        drawn.start("", work(variants, domains, generates=generates) + work(single, select))
        chosen_on = measure(stage, single, select, advance=drawn.advance) if select else None
        scores = measure(stage, variants, domains, generates=generates, advance=drawn.advance)
    oracle = best_single(variants, chosen_on or scores, select or domains)
    resamples, seed = data["settings"]["resamples"], data["settings"]["seed"]
    data["domains"] = {domain.name: facts(domain) for domain in domains}
    data["variants"] = report(variants, domains, scores, oracle, resamples=resamples, seed=seed)
    data["without"] = changes(variants, domains, scores, partial(texts, stage.engine))
    data["oracle"] = {
        "chosen": oracle,
        "on": {domain.name: facts(domain) for domain in select} if select else "the same data",
    }
    return [*remarks(domains, loadout.recipe.router.scope), *about_seen(loadout, domains)]


def _against(data: dict[str, Any], before: Baseline | None, most: float | None) -> list[Finding]:
    if before is None:
        return []
    from lmoe_cli.evaluate.baseline import compare

    data["baseline"], findings = compare(data, before, 0.01 if most is None else most)
    return findings

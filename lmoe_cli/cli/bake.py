"""`lmoe bake`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output, size
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.loadout.loadout import Loadout


MOST_JOBS = 4
METHODS = ("linear", "ties", "dare", "dare_ties", "della", "magnitude")


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--out", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--as", "kind", type=click.Choice(["model", "adapter"]), default="model", help="What to write.")
@click.option("--method", type=click.Choice(METHODS), help="How deltas are combined; the recipe's when left out.")
@click.option("--dtype", type=click.Choice(params.DTYPES), help="Of the tensors; that of the base when left out.")
@click.option("--rank", type=click.IntRange(1), help="With --as adapter: cut to this rank; exact when left out.")
@click.option("--for", "target", type=click.Choice(["vllm"]), help="Keep to what that engine takes.")
@click.option("--shard-size", metavar="SIZE", help="Largest file, such as 5GB; as the base when left out.")
@click.option("--jobs", type=click.IntRange(1, 64), help="Files written at a time; as many as cores, up to 4.")
@click.option("--verify", is_flag=True, help="Compare with the live blend; write nothing where they differ.")
@params.force
@params.blend
@params.token
@params.trust_remote_code
@params.output
def bake(
    recipe: Path | None,
    folder: Path,
    kind: str,
    method: str | None,
    dtype: str | None,
    rank: int | None,
    target: str | None,
    shard_size: str | None,
    jobs: int | None,
    verify: bool,
    force: bool,
    blend: params.Blend,
    token: str | None,
    trust_remote_code: bool,
    out: Output,
) -> None:
    """Write a loadout as one ordinary model or adapter.

    The model is never loaded: each tensor is the base's plus the weighted deltas in float32, rounded once and
    streamed. The folder appears whole or not at all, with a bake-report.json in it.
    """
    from lmoe_cli.check import require
    from lmoe_cli.files import refuse_existing
    from lmoe_cli.loadout.loadout import resolve

    if rank and kind == "model":
        raise UsageError("usage", "--rank goes with --as adapter", hint="lmoe bake … --as adapter --rank 64")
    if kind == "adapter" and (shard_size or jobs):
        raise UsageError("usage", "--shard-size and --jobs go with --as model", hint="leave them out")
    if rank and verify:
        message = "an adapter cut to a rank is not the blend: its report tells the error of every module"
        raise UsageError("verify-impossible", message, hint="leave out --rank or --verify")
    refuse_existing(folder, force=force)
    (request,) = params.requests([recipe] if recipe else [], blend)
    parsed = request.recipe()
    if method:
        parsed = parsed.model_copy(update={"bake": parsed.bake.model_copy(update={"method": method})})
    loadout = resolve(parsed, request.origin, beside=request.beside, token=token)
    out.warn(require(loadout, trust_remote_code=trust_remote_code).findings)
    with bar(out, "fetching") as fetched:
        loadout.fetch(fetched)
    if kind == "adapter":
        report = _adapter(out, loadout, folder, rank, dtype, target, verify=verify, force=force)
    else:
        files_at_once = jobs or min(os.cpu_count() or 1, MOST_JOBS)
        report = _model(
            out,
            loadout,
            folder,
            dtype,
            shard_size,
            files_at_once,
            verify=verify,
            force=force,
        )
    if target == "vllm":
        out.say(_vllm(loadout, folder, kind, report))
    out.finish({"out": str(folder), "as": kind, "report": report})


def _model(
    out: Output,
    loadout: Loadout,
    folder: Path,
    dtype: str | None,
    shard_size: str | None,
    jobs: int,
    *,
    verify: bool,
    force: bool,
) -> dict[str, Any]:
    from lmoe_cli.bake.model import bake_model
    from lmoe_cli.bake.plan import parse_size
    from lmoe_cli.bake.verify import verify as compare

    def verified(written: Path) -> dict[str, Any]:
        drawn.close()
        out.say("comparing with the live blend …")
        return compare(loadout, written).as_dict()

    with bar(out, "baking") as drawn:
        report = bake_model(
            loadout,
            folder,
            dtype=dtype,
            shard_size=parse_size(shard_size) if shard_size else None,
            jobs=jobs,
            force=force,
            verify=verified if verify else None,
            begin=lambda plan: drawn.start("", plan.size),
            advance=drawn.advance,
        )
    worst = max((tensor["rounding"] for tensor in report["tensors"]), default=0.0)
    out.say(
        f"{folder}: {size(report['bytes'])} in {report['seconds']:.1f} s, {report['changed']} tensors changed, "
        f"{report['copied']} copied, rounding took {worst:.1e} at most"
    )
    _say_verified(out, report)
    return report


def _adapter(
    out: Output,
    loadout: Loadout,
    folder: Path,
    rank: int | None,
    dtype: str | None,
    target: str | None,
    *,
    verify: bool,
    force: bool,
) -> dict[str, Any]:
    from lmoe_cli.bake.adapter import bake_adapter
    from lmoe_cli.bake.verify import verify_adapter

    def verified(written: Path) -> dict[str, Any]:
        out.say("comparing with the live blend …")
        return verify_adapter(loadout, written).as_dict()

    report = bake_adapter(
        loadout, folder, rank=rank, dtype=dtype, target=target, force=force, verify=verified if verify else None
    )
    if rank:
        rows = [(item["name"], item["rank"], f"{item['error']:.2%}") for item in report["modules"]]
        out.table("what was cut off", ("module", "rank", "relative error"), rows)
    ranks = sorted({item["rank"] for item in report["modules"]})
    span = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else ranks[0]
    out.say(f"{folder}: {len(report['modules'])} modules of rank {span}, {report['seconds']:.1f} s")
    _say_verified(out, report)
    return report


def _say_verified(out: Output, report: dict[str, Any]) -> None:
    if seen := report.get("verify"):
        out.say(
            f"verified on {seen['positions']} tokens: logits {seen['difference']:.1e} from the live blend "
            f"(rounding allows {seen['allowed']:.1e}, the blend changes {seen['effect']:.1e})"
        )


def _vllm(loadout: Loadout, folder: Path, kind: str, report: dict[str, Any]) -> str:
    """The command line that serves what was baked."""
    if kind == "model":
        return f"vllm serve {folder}"
    from lmoe_cli.bake.adapter import base_name

    rank = max(item["rank"] for item in report["modules"])
    name = loadout.recipe.name or folder.name
    return f"vllm serve {base_name(loadout.base)} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}"

"""`lmoe bake`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.cli import fixed, params
from lmoe_cli.cli.baked import Comparison, comparison, say_verified, serve_line
from lmoe_cli.cli.output import Output, size
from lmoe_cli.cli.progress import bar
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.bake.base_weights import BaseWeights
    from lmoe_cli.bake.model import Rounding
    from lmoe_cli.loadout.base import Base
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
@click.option(
    "--rounding",
    type=click.Choice(["exact", "fused"]),
    help="Add up in float32, or by the processor's matrix unit in bfloat16; what is quicker here when left out.",
)
@click.option(
    "--base-weights",
    type=click.Choice(["original", "dequantized"]),
    help="Onto what, where the base is stored quantised: the model it was made from, or what its weights stand for, "
    "which is written in 16 bits unless --dtype says more.",
)
@click.option("--original", metavar="REF", type=params.TEXT, help="With --base-weights original: that model.")
@click.option("--verify", is_flag=True, help="Compare with the live blend; write nothing where they differ.")
@fixed.options
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
    rounding: Rounding | None,
    base_weights: str | None,
    original: str | None,
    verify: bool,
    asked: fixed.Asked,
    force: bool,
    blend: params.Blend,
    token: str | None,
    trust_remote_code: bool,
    out: Output,
) -> None:
    """Write a loadout as one ordinary model or adapter.

    The model is never loaded: each tensor is the base's plus the weighted deltas in float32, rounded once and
    streamed. The folder appears whole or not at all, with a bake-report.json in it.

    A router that decides per token or prompt cannot be written into weights. --mean-gates bakes the mean of its gates
    on --data, site by site, and tells the KL divergence to the routed model on the half that is held out, beside that
    of the uniform blend and of each expert alone. --prompt bakes the blend of one prompt.
    """
    from lmoe_cli.check import require
    from lmoe_cli.files import refuse_existing
    from lmoe_cli.loadout.loadout import resolve

    if rank and kind == "model":
        raise UsageError("usage", "--rank goes with --as adapter", hint="lmoe bake … --as adapter --rank 64")
    if kind == "adapter" and (shard_size or jobs or base_weights or rounding):
        message = "--shard-size, --jobs, --rounding and --base-weights go with --as model"
        raise UsageError("usage", message, hint="leave them out")
    if original and base_weights != "original":
        hint = f"--base-weights original --original {original}"
        raise UsageError("usage", "--original goes with --base-weights original", hint=hint)
    if rank and verify:
        message = "an adapter cut to a rank is not the blend: its report tells the error of every module"
        raise UsageError("verify-impossible", message, hint="leave out --rank or --verify")
    refuse_existing(folder, force=force)
    (request,) = params.requests([recipe] if recipe else [], blend)
    parsed = request.recipe()
    if method:
        parsed = parsed.model_copy(update={"bake": parsed.bake.model_copy(update={"method": method})})
    loadout = resolve(parsed, request.origin, beside=request.beside, token=token)
    findings = require(loadout, trust_remote_code=trust_remote_code).findings
    out.warn(findings)
    fixed.require_asked(loadout, asked, force=force)
    if base_weights:
        _require_choice(loadout.base, base_weights, original, verify=verify)
    with bar(out, "fetching") as fetched:
        loadout.fetch(fetched)
    loadout, routed = fixed.fixed(out, loadout, asked, trust_remote_code=trust_remote_code)
    told: Mapping[str, Any] = {}
    if base_weights:
        chosen = _chosen(out, loadout, folder, original, request.beside, token, force=force)
        loadout, told = chosen.loadout, chosen.facts
        again = require(loadout, trust_remote_code=trust_remote_code).findings
        out.warn(item for item in again if item not in findings)
        out.say(chosen.meaning)
    verified = comparison(out, loadout, kind, trusts=trust_remote_code) if verify else None
    if kind == "adapter":
        report = _adapter(out, loadout, folder, rank, dtype, target, verify=verified, force=force, routed=routed)
    else:
        files_at_once = jobs or min(os.cpu_count() or 1, MOST_JOBS)
        report = _model(
            out,
            loadout,
            folder,
            dtype,
            shard_size,
            files_at_once,
            rounding,
            verify=verified,
            force=force,
            told=told,
            routed=routed,
        )
    if asked.recipe:
        fixed.save_recipe(out, loadout, asked.recipe, force=force)
    if target == "vllm":
        out.say(serve_line(loadout, folder, kind, report))
    out.finish({"out": str(folder), "as": kind, "report": report})


def _require_choice(base: Base, choice: str, original: str | None, *, verify: bool) -> None:
    """Refuse a choice of weights that there is not, or that lacks its other half.

    Raises:
        UsageError: The base is not packed by bitsandbytes, nobody named the original, or verifying needs bitsandbytes.
    """
    from lmoe_cli.loadout.dequantized import METHOD

    if base.quantization is None:
        message = f"{base.ref} is not stored quantised, so --base-weights has nothing to choose"
        raise UsageError("usage", message, hint="leave it out: the bake starts from its own weights")
    if base.quantization != METHOD:
        message = f"{base.ref}: stored quantised by {base.quantization}, which --base-weights does not read"
        raise UsageError("bake-quantized", message, hint="name the unquantised model as base", where=base.ref)
    if choice == "original" and not original:
        claim = base.config.get("_name_or_path")
        names = f"; its config names {claim}" if isinstance(claim, str) and claim else ""
        message = f"{base.ref} was quantised from a model that must be named: a config is not believed"
        raise UsageError("usage", message, hint=f"--base-weights original --original REF{names}")
    if choice == "dequantized" and verify:
        from lmoe_cli.engine.base_model import require_bitsandbytes

        require_bitsandbytes()


def _chosen(
    out: Output,
    loadout: Loadout,
    folder: Path,
    original: str | None,
    beside: Path | None,
    token: str | None,
    *,
    force: bool,
) -> BaseWeights:
    """The weights to bake onto: the original where it is named, else what the base's weights stand for."""
    from lmoe_cli.bake.base_weights import from_dequantized, from_original
    from lmoe_cli.bake.model import refuse_out
    from lmoe_cli.bake.original import require_same_layout
    from lmoe_cli.loadout.base import read_base
    from lmoe_cli.source import open_source

    refuse_out(loadout, folder, force=force)  # the folder of the packed base is no place to write to either
    plain = loadout.dequantized
    if original is None:
        return from_dequantized(plain)
    base = read_base(open_source(original, token=token, beside=beside))
    names = require_same_layout(plain.base, base)
    with bar(out, "fetching") as fetched:
        base.source.fetch(base.files, fetched)
    with bar(out, "comparing") as drawn:
        drawn.start("", base.size)
        return from_original(plain, base, names, drawn.advance)


def _model(
    out: Output,
    loadout: Loadout,
    folder: Path,
    dtype: str | None,
    shard_size: str | None,
    jobs: int,
    rounding: Rounding | None,
    *,
    verify: Comparison | None,
    force: bool,
    told: Mapping[str, Any],
    routed: Mapping[str, Any],
) -> dict[str, Any]:
    from lmoe_cli.bake.model import bake_model
    from lmoe_cli.bake.plan import parse_size

    def verified(written: Path) -> dict[str, Any]:
        assert verify, "else nobody asks"
        drawn.close()
        return verify(written)

    with bar(out, "baking") as drawn:
        report = bake_model(
            loadout,
            folder,
            dtype=dtype,
            shard_size=parse_size(shard_size) if shard_size else None,
            jobs=jobs,
            rounding=rounding,
            force=force,
            verify=verified if verify else None,
            base_weights=told,
            routed=routed,
            begin=lambda plan: drawn.start("", plan.size),
            advance=drawn.advance,
        )
    worst = max((tensor["rounding"] for tensor in report["tensors"]), default=0.0)
    out.say(
        f"{folder}: {size(report['bytes'])} in {report['seconds']:.1f} s, {report['changed']} tensors changed, "
        f"{report['copied']} copied, rounding took {worst:.1e} at most"
    )
    if report["rounding"]["way"] == "fused":
        share = report["rounding"]["differing"]
        out.say(
            f"the matrix unit rounded {share:.2g} of the elements otherwise than float32; --rounding exact does not"
        )
    say_verified(out, report)
    return report


def _adapter(
    out: Output,
    loadout: Loadout,
    folder: Path,
    rank: int | None,
    dtype: str | None,
    target: str | None,
    *,
    verify: Comparison | None,
    force: bool,
    routed: Mapping[str, Any],
) -> dict[str, Any]:
    from lmoe_cli.bake.adapter import bake_adapter

    report = bake_adapter(
        loadout,
        folder,
        rank=rank,
        dtype=dtype,
        target=target,
        force=force,
        verify=verify,
        routed=routed,
    )
    if rank:
        rows = [(item["name"], item["rank"], f"{item['error']:.2%}") for item in report["modules"]]
        out.table("what was cut off", ("module", "rank", "relative error"), rows)
    ranks = sorted({item["rank"] for item in report["modules"]})
    span = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else ranks[0]
    out.say(f"{folder}: {len(report['modules'])} modules of rank {span}, {report['seconds']:.1f} s")
    say_verified(out, report)
    return report

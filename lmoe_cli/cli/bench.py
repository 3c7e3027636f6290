"""`lmoe bench`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmoe_cli.bench.shapes import SHAPES
from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output, size
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from lmoe_cli.bench.variants import Gating, Variant

NOISY = 0.3
"""Distance between the quartiles of a step's time, relative to the median, beyond which numbers mean little."""


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--synthetic", type=click.Choice(list(SHAPES)), help="Random weights of this shape instead of a recipe.")
@click.option(
    "--experts", "count", type=click.IntRange(1, 256), default=4, show_default=True, help="How many, at most."
)
@click.option("--rank", type=click.IntRange(1, 4096), default=16, show_default=True, help="Of synthetic experts.")
@click.option("--layers", type=click.IntRange(1), help="Only so many layers of --synthetic, with a small vocabulary.")
@click.option("--dtype", type=click.Choice(params.DTYPES), help="Of the weights; chosen for the device when left out.")
@click.option("--quantize", type=click.Choice(["nf4", "int8"]), help="Quantise the base while it loads.")
@click.option("--device", help="cpu, cuda, cuda:1, mps; the best there is when left out.")
@click.option("--batch", type=click.IntRange(1, 4096), default=1, show_default=True, help="Rows computed together.")
@click.option("--per-row", is_flag=True, help="Give every row of the batch a blend of its own.")
@click.option("--top", type=click.IntRange(1, 256), metavar="K", help="Give every token K experts of its own.")
@click.option("--context", type=click.IntRange(1), default=32, show_default=True, help="Tokens in the cache.")
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Tokens per round.")
@click.option("--prefill", type=click.IntRange(2), metavar="TOKENS", help="Time prompts of this length, not steps.")
@click.option("--compile", "with_compiler", is_flag=True, help="Let torch compile the steps of base and blends.")
@click.option("--rounds", type=click.IntRange(2), default=15, show_default=True, help="Rounds per variant.")
@click.option("--peft", "with_peft", is_flag=True, help="Measure PEFT's own active adapters too.")
@params.blend
@params.token
@params.trust_remote_code
@params.output
def bench(
    recipe: Path | None,
    synthetic: str | None,
    count: int,
    rank: int,
    layers: int | None,
    dtype: str | None,
    quantize: str | None,
    device: str | None,
    batch: int,
    per_row: bool,
    top: int | None,
    context: int,
    steps: int,
    prefill: int | None,
    with_compiler: bool,
    rounds: int,
    with_peft: bool,
    blend: params.Blend,
    token: str | None,
    trust_remote_code: bool,
    out: Output,
) -> None:
    """Measure the speed of base, blend and folded blend, side by side.

    A quantised base cannot be folded into, so there base and blend are measured. Neither can a router that decides:
    there `blend` has fixed weights, and `routed` is the recipe as it runs, where it decides per token.

    Everything runs in one process, in turn, after a warm-up. The ratio is the median over rounds of a variant's speed
    to the base's in the same round; the byte limit is what reading the experts beside the base allows. `base` is the
    model as transformers runs it, `bare` the same by the products that a blend is computed with.
    """
    if synthetic and (recipe or blend.is_given):
        raise UsageError("usage", "--synthetic excludes a recipe and --base", hint="leave one of them out")
    if per_row and top:
        raise UsageError("usage", "--per-row gives rows a blend, --top gives tokens one", hint="leave one of them out")
    if with_compiler and (prefill or with_peft):
        raise UsageError(
            "usage", "--compile is for the steps of base and blends", hint="leave out --prefill and --peft"
        )
    asked = _Asked(
        count, dtype, quantize, device, per_row=per_row, top=top, with_peft=with_peft, is_compiled=with_compiler,
        answers=batch == 1 and not prefill,
    )  # fmt: skip
    if synthetic:
        model, variants = _synthetic(synthetic, rank, layers, asked)
    else:
        model, variants = _recipe(recipe, blend, token, asked, trust_remote_code=trust_remote_code)
    from lmoe_cli.bench.machine import machine
    from lmoe_cli.bench.measure import linear_bytes, measure, step_bytes
    from lmoe_cli.bench.variants import compiled
    from lmoe_cli.bench.work import SEED, Decode, Prefill

    parameter = next(model.parameters())
    found = machine(parameter.device)
    work = Prefill(batch, prefill) if prefill else Decode(batch, context, steps, is_static=with_compiler)
    if with_compiler:
        variants = [compiled(model, variant) for variant in variants]
    rows = measure(model, variants, work, rounds, out.say if out.verbose else lambda _: None)
    weights = linear_bytes(model) if prefill else step_bytes(model)
    kind = str(parameter.dtype).removeprefix("torch.")
    numbers = f"{quantize}, {kind}" if quantize else kind
    what = f"prompts of {prefill} tokens" if prefill else f"context {context}"
    title = f"{synthetic or recipe or 'blend'}, {numbers}, {size(weights)} per step, batch {batch}, {what}"
    columns = ("variant", "experts", "tokens/s", "ms/token", "± quartiles", "of base", "byte limit", "memory")
    out.table(
        title + (", compiled" if with_compiler else ""),
        columns,
        [
            (row.variant, row.experts, f"{row.tokens_per_s:.1f}", f"{row.ms_per_token:.2f}", f"{row.spread:.0%}",
             f"{row.ratio_to_base:.2f}", f"{row.byte_limit:.2f}", size(row.peak_bytes))
            for row in rows
        ],
    )  # fmt: skip
    out.say(f"{found['device']}, {found['threads']} threads, {found['bandwidth_gb_s']} GB/s by a copy")
    versions = ", ".join(f"{name} {found[name]}" for name in ("lmoe", "torch", "transformers", "peft"))
    out.say(f"{versions}; seed {SEED}")
    if noisy := [row.variant for row in rows if row.spread > NOISY]:
        out.say(f"times of {', '.join(dict.fromkeys(noisy))} vary by more than {NOISY:.0%}: is something else running?")
    settings = {
        "synthetic": synthetic, "rank": rank, "layers": layers, "dtype": kind, "batch": batch, "per_row": per_row,
        "quantize": quantize, "top": top, "prefill": prefill, "compiled": with_compiler, "context": context,
        "steps": steps, "rounds": rounds, "seed": SEED,
    }  # fmt: skip
    out.finish({"rows": [asdict(row) for row in rows], "machine": found, "settings": settings, "step_bytes": weights})


@dataclass(frozen=True)
class _Asked:
    """What is to be measured, whatever the model."""

    count: int
    """Experts, at most."""
    dtype: str | None
    quantize: str | None
    device: str | None
    per_row: bool
    top: int | None
    with_peft: bool
    is_compiled: bool
    """Steps are compiled, which those of a router that decides per token are not."""
    answers: bool
    """One token at a time is computed; see `choose_dtype`."""

    def gating(self) -> Gating | None:
        """What gives rows or tokens blends of their own."""
        from lmoe_cli.bench.variants import Gating

        return Gating(self.top) if self.per_row or self.top else None


def _synthetic(shape: str, rank: int, layers: int | None, asked: _Asked) -> tuple[nn.Module, list[Variant]]:
    from lmoe_cli.bench import synthetic, variants
    from lmoe_cli.engine.device import DTYPES, choose_device

    if layers and layers > SHAPES[shape]["num_hidden_layers"]:
        most = SHAPES[shape]["num_hidden_layers"]
        raise UsageError("usage", f"{shape} has {most} layers", hint=f"--layers {most} or less")
    place = choose_device(asked.device)
    kind = DTYPES[asked.dtype or ("float32" if place.type == "cpu" else "bfloat16")]
    model = synthetic.synthetic_model(shape, layers, kind, place)
    if asked.quantize:
        synthetic.quantize(model, asked.quantize, kind)
    banks = [synthetic.synthetic_bank(model, number, rank, kind) for number in variants.counts(asked.count)]
    found = [variants.base(), variants.bare(model, banks[-1])]
    found += [variants.blend(model, bank, asked.gating()) for bank in banks]
    if not asked.gating() and not asked.quantize:
        found.append(variants.folded(model, banks[-1], synthetic.fill))
    if asked.with_peft:
        found.append(variants.peft(model, variants.random_adapters(asked.count, rank)))
    return model, found


def _recipe(
    recipe: Path | None, blend: params.Blend, token: str | None, asked: _Asked, *, trust_remote_code: bool
) -> tuple[nn.Module, list[Variant]]:
    from lmoe_cli.check import require
    from lmoe_cli.loadout.loadout import resolve

    (request,) = params.requests([recipe] if recipe else [], blend)
    loadout = resolve(request.recipe(), request.origin, beside=request.beside, token=token)
    require(loadout, trust_remote_code=trust_remote_code)
    if asked.quantize and loadout.base.quantization:
        message = f"{loadout.base.ref} is stored quantised ({loadout.base.quantization})"
        raise UsageError("usage", message, hint="leave --quantize out: it is measured as it is stored")

    from lmoe_cli.bench import variants
    from lmoe_cli.engine.build import start

    if not loadout.experts and (asked.top or asked.with_peft):
        raise UsageError("usage", "--top and --peft need experts", hint="leave them out, or name some")
    scope = loadout.recipe.router.scope
    if scope != "token":
        loadout = replace(loadout.live, experts=loadout.experts[: asked.count])
    engine = start(
        loadout,
        device=asked.device,
        dtype=asked.dtype,
        quantize=asked.quantize,
        compiles=asked.is_compiled,
        trust_remote_code=trust_remote_code,
        answers=asked.answers,
    )
    model = engine.detach()
    found = [variants.base(), variants.bare(model, engine.bank)]
    most = min(asked.count, len(loadout.experts))
    found += [variants.of_engine(engine, number, asked.gating()) for number in variants.counts(most)]
    if scope == "token" and not asked.is_compiled:
        found.append(variants.routed(engine))
    if scope == "fixed" and not asked.gating() and not (asked.quantize or loadout.base.quantization):
        found.append(variants.folded_engine(engine))
    if asked.with_peft:
        found.append(variants.peft(model, variants.stored_adapters(loadout)))
    return model, found

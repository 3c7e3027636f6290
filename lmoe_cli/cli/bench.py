"""`lmoe bench`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmoe_cli.bench.shapes import SHAPES
from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output, size
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from lmoe_cli.bench.variants import Variant

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
@click.option("--batch", type=click.IntRange(1, 4096), default=1, show_default=True, help="Rows decoded together.")
@click.option("--context", type=click.IntRange(1), default=32, show_default=True, help="Tokens in the cache.")
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Tokens per round.")
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
    context: int,
    steps: int,
    rounds: int,
    with_peft: bool,
    blend: params.Blend,
    token: str | None,
    trust_remote_code: bool,
    out: Output,
) -> None:
    """Measure the speed of base, blend and folded blend, side by side.

    A quantised base cannot be folded into, so there base and blend are measured.

    Everything runs in one process, in turn, after a warm-up. The ratio is the median over rounds of a variant's speed
    to the base's in the same round; the byte limit is what reading the experts beside the base allows.
    """
    if synthetic and (recipe or blend.is_given):
        raise UsageError("usage", "--synthetic excludes a recipe and --base", hint="leave one of them out")
    if synthetic:
        model, variants = _synthetic(synthetic, count, rank, layers, dtype, quantize, device, with_peft=with_peft)
    else:
        model, variants = _recipe(
            recipe,
            blend,
            count,
            dtype,
            quantize,
            device,
            token,
            with_peft=with_peft,
            trust_remote_code=trust_remote_code,
        )
    from lmoe_cli.bench.machine import machine
    from lmoe_cli.bench.measure import Load, measure, step_bytes

    parameter = next(model.parameters())
    found = machine(parameter.device)
    load = Load(batch, context, steps, rounds)
    rows = measure(model, variants, load, out.say if out.verbose else lambda _: None)
    weights = step_bytes(model)
    kind = str(parameter.dtype).removeprefix("torch.")
    numbers = f"{quantize}, {kind}" if quantize else kind
    title = f"{synthetic or recipe or 'blend'}, {numbers}, {size(weights)} per step, batch {batch}, context {context}"
    columns = ("variant", "experts", "tokens/s", "ms/token", "± quartiles", "of base", "byte limit", "memory")
    out.table(
        title,
        columns,
        [
            (row.variant, row.experts, f"{row.tokens_per_s:.1f}", f"{row.ms_per_token:.2f}", f"{row.spread:.0%}",
             f"{row.ratio_to_base:.2f}", f"{row.byte_limit:.2f}", size(row.peak_bytes))
            for row in rows
        ],
    )  # fmt: skip
    out.say(f"{found['device']}, {found['threads']} threads, {found['bandwidth_gb_s']} GB/s by a copy")
    if noisy := [row.variant for row in rows if row.spread > NOISY]:
        out.say(f"times of {', '.join(dict.fromkeys(noisy))} vary by more than {NOISY:.0%}: is something else running?")
    settings = {
        "synthetic": synthetic,
        "rank": rank,
        "layers": layers,
        "dtype": kind,
        "quantize": quantize,
        **asdict(load),
    }
    out.finish({"rows": [asdict(row) for row in rows], "machine": found, "settings": settings, "step_bytes": weights})


def _synthetic(
    shape: str,
    count: int,
    rank: int,
    layers: int | None,
    dtype: str | None,
    quantize: str | None,
    device: str | None,
    *,
    with_peft: bool,
) -> tuple[nn.Module, list[Variant]]:
    from lmoe_cli.bench import synthetic, variants
    from lmoe_cli.engine.device import DTYPES, choose_device

    if layers and layers > SHAPES[shape]["num_hidden_layers"]:
        most = SHAPES[shape]["num_hidden_layers"]
        raise UsageError("usage", f"{shape} has {most} layers", hint=f"--layers {most} or less")
    place = choose_device(device)
    kind = DTYPES[dtype or ("float32" if place.type == "cpu" else "bfloat16")]
    model = synthetic.synthetic_model(shape, layers, kind, place)
    if quantize:
        synthetic.quantize(model, quantize, kind)
    banks = [synthetic.synthetic_bank(model, number, rank, kind) for number in variants.counts(count)]
    found = [variants.base(), *(variants.blend(model, bank) for bank in banks)]
    if not quantize:
        found.append(variants.folded(model, banks[-1], synthetic.fill))
    if with_peft:
        found.append(variants.peft(model, variants.random_adapters(count, rank)))
    return model, found


def _recipe(
    recipe: Path | None,
    blend: params.Blend,
    count: int,
    dtype: str | None,
    quantize: str | None,
    device: str | None,
    token: str | None,
    *,
    with_peft: bool,
    trust_remote_code: bool,
) -> tuple[nn.Module, list[Variant]]:
    from lmoe_cli.check import require
    from lmoe_cli.loadout.loadout import resolve

    (request,) = params.requests([recipe] if recipe else [], blend)
    loadout = resolve(request.recipe(), request.origin, beside=request.beside, token=token)
    require(loadout, trust_remote_code=trust_remote_code)
    if quantize and loadout.base.quantization:
        message = f"{loadout.base.ref} is stored quantised ({loadout.base.quantization})"
        raise UsageError("usage", message, hint="leave --quantize out: it is measured as it is stored")

    from lmoe_cli.bench import variants
    from lmoe_cli.engine.build import start

    loadout = replace(loadout.live, experts=loadout.experts[:count])
    engine = start(loadout, device=device, dtype=dtype, quantize=quantize, trust_remote_code=trust_remote_code)
    model = engine.detach()
    found = [variants.base()]
    found += [variants.of_engine(engine, number) for number in variants.counts(len(loadout.experts))]
    if not (quantize or loadout.base.quantization):
        found.append(variants.folded_engine(engine))
    if with_peft:
        found.append(variants.peft(model, variants.stored_adapters(loadout)))
    return model, found

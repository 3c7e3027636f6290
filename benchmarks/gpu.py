"""The table of a CUDA device, in one command under 8 minutes: `python -m benchmarks gpu`."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.process import child
from benchmarks.table import at_least, markdown

if TYPE_CHECKING:
    from torch import nn

    from lmoe_cli.bank.bank import Bank
    from lmoe_cli.bench.variants import Variant
    from lmoe_cli.bench.work import Work

DEVICE, SHAPE, RANK = "cuda", "qwen3-4b", 8
"""Experts of rank 8 on all linear layers of that shape have 33 MB."""
EXPERTS = (2, 4)
BUDGET_S = 400
"""What was not begun by then is left out, and named, as is what failed."""
LEAST_OF_BOUND = 0.6
COMPILED, EAGER, TOKENS, ROWS, PROMPT = "compiled", "eager", "gates of tokens", "32 rows", "prompt"
TARGETS = {COMPILED: 0.90, TOKENS: 0.85, ROWS: 0.85, PROMPT: 0.90}
SAID = {
    COMPILED: "Decoding, compiled, CUDA graphs",
    TOKENS: "Decoding, compiled, gates given for each token",
    ROWS: "32 rows with 32 blends, compiled",
    PROMPT: "A prompt of 2048 tokens",
    EAGER: "Decoding, eager",
}


def measure() -> dict[str, Any]:
    """In a process of its own."""
    found: dict[str, Any] = child("benchmarks.gpu", DEVICE, SHAPE)
    return found


def text(found: dict[str, Any]) -> str:
    """The tables in Markdown."""
    parts = [f"{SHAPE} shape, bfloat16, experts of rank {RANK} on all linear layers.\n\n"]
    for name, rows in found["tables"].items():
        head = ("variant", "experts", "tokens/s", "ms/token", "of base", "limit", "asked", "memory bound")
        cells = [
            (row["variant"], str(row["experts"]), f"{row['tokens_per_s']:.1f}", f"{row['ms_per_token']:.3f}",
             f"{row['ratio_to_base']:.2f}", f"{row['byte_limit']:.2f}",
             at_least(row["ratio_to_base"], TARGETS.get(name)) if row["variant"] == "blend" else "",
             _of_bound(found, name, row))
            for row in rows
        ]  # fmt: skip
        parts.append(f"### {SAID[name]}\n\n{markdown(head, cells)}\n")
    parts += [f"{SAID[name]}: left out, {reason}.\n" for name, reason in found["left_out"].items()]
    return "".join(parts)


def _of_bound(found: dict[str, Any], name: str, row: dict[str, Any]) -> str:
    """How near a step comes to reading its bytes at the speed of a copy."""
    if name not in (COMPILED, EAGER):
        return ""
    bound_ms = found["step_bytes"] / row["byte_limit"] / found["bandwidth_gb_s"] / 1e6
    target = LEAST_OF_BOUND if name == COMPILED and row["variant"] == "base" else None
    ratio = bound_ms / row["ms_per_token"]
    return f"{ratio:.2f} {at_least(ratio, target)}".strip()


def main(device: str, shape: str, layers: str | None = None) -> None:
    """Measure and print what was found as JSON."""
    import torch

    from lmoe_cli.bench import synthetic
    from lmoe_cli.bench.machine import machine
    from lmoe_cli.bench.measure import measure as timed
    from lmoe_cli.bench.measure import step_bytes

    began = time.perf_counter()
    place = torch.device(device)
    model = synthetic.synthetic_model(shape, int(layers) if layers else None, torch.bfloat16, place)
    tables: dict[str, Any] = {}
    left_out = {}
    for name, ways, work, rounds in _tables(model):
        if time.perf_counter() - began > BUDGET_S:
            left_out[name] = "as the time was over"
            continue
        try:
            tables[name] = [asdict(row) for row in timed(model, ways, work, rounds)]
        except Exception as error:  # noqa: BLE001 - the other tables are worth the minutes that they took
            traceback.print_exc()
            left_out[name] = f"as it failed: {type(error).__name__}"
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    bandwidth = machine(place)["bandwidth_gb_s"]
    told = {"tables": tables, "left_out": left_out, "step_bytes": step_bytes(model), "bandwidth_gb_s": bandwidth}
    print(json.dumps(told))


def _tables(model: nn.Module) -> Iterator[tuple[str, Sequence[Variant], Work, int]]:
    """What is measured, the most important first."""
    import torch

    from lmoe_cli.bench import synthetic, variants
    from lmoe_cli.bench.work import Decode, Prefill

    def bank(experts: int) -> Bank:
        return synthetic.synthetic_bank(model, experts, RANK, torch.bfloat16)

    banks = [bank(number) for number in EXPERTS]
    largest = banks[-1]
    plain = [variants.base(), *(variants.blend(model, bank) for bank in banks)]
    steps = Decode(1, 32, 32, is_static=True)
    yield COMPILED, [variants.compiled(model, way) for way in plain], steps, 9
    each = variants.blend(model, bank(EXPERTS[-1]), variants.Gating(of_tokens=True))
    yield TOKENS, [variants.compiled(model, way) for way in (variants.base(), each)], steps, 9
    many, own = Decode(32, 32, 16, is_static=True), variants.blend(model, bank(EXPERTS[-1]), variants.Gating())
    yield ROWS, [variants.compiled(model, way) for way in (variants.base(), own)], many, 9
    peft = variants.peft(model, variants.random_adapters(EXPERTS[-1], RANK))
    yield PROMPT, [*plain, peft], Prefill(1, 2048), 9
    bare, folded = variants.bare(model, largest), variants.folded(model, largest, synthetic.fill)
    yield EAGER, [variants.base(), bare, *plain[1:], folded, peft], Decode(1, 32, 16), 9


if __name__ == "__main__":
    main(*sys.argv[1:])

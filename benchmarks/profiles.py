"""Where the time of a decoding step goes: operators, how often they are called and how long they take."""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.process import child
from benchmarks.speed import DTYPES
from benchmarks.table import markdown

EXPERTS, RANK, LAYERS, STEPS, SHOWN = 4, 32, 8, 24, 9
VARIANTS = ("base", "bare", "blend")


def measure() -> dict[str, Any]:
    """Each dtype in a process of its own."""
    return {"dtypes": {dtype: child("benchmarks.profiles", dtype) for dtype in DTYPES}}


def text(found: dict[str, Any]) -> str:
    """A table for each dtype in Markdown."""
    return "\n".join(f"{dtype}:\n\n{_table(variants)}" for dtype, variants in found["dtypes"].items())


def _table(variants: dict[str, dict[str, list[float]]]) -> str:
    totals = {name: sum(self_us for _, self_us in operators.values()) for name, operators in variants.items()}
    names = {name for operators in variants.values() for name in operators}
    longest = sorted(names, key=lambda name: -max(operators.get(name, (0, 0))[1] for operators in variants.values()))
    cells = [
        (f"`{name}`", *(_cell(*variants[variant].get(name, (0, 0))) for variant in VARIANTS))
        for name in longest[:SHOWN]
    ]
    rest = [
        _cell(*map(sum, zip(*(variants[variant].get(name, (0, 0)) for name in longest[SHOWN:]), strict=True)))
        for variant in VARIANTS
    ]
    cells += [("everything else", *rest)]
    cells += [("together", *(f"{totals[variant] / 1e3:.2f} ms" for variant in VARIANTS))]
    return markdown(("operator", *(f"{variant}: calls, ms" for variant in VARIANTS)), cells)


def _cell(calls: float, self_us: float) -> str:
    return f"{calls:.0f}, {self_us / 1e3:.2f}" if calls else "–"


def main(dtype: str) -> None:
    """Profile one dtype and print operator → (calls, microseconds) of a step, for each variant, as JSON."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from lmoe_cli.bench import synthetic, variants
    from lmoe_cli.bench.work import Decode

    numbers = getattr(torch, dtype)
    model = synthetic.synthetic_model("qwen3-0.6b", LAYERS, numbers, torch.device("cpu"))
    bank = synthetic.synthetic_bank(model, EXPERTS, RANK, numbers)
    ways = dict(zip(VARIANTS, (variants.base(), variants.bare(model, bank), variants.blend(model, bank)), strict=True))
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, way in ways.items():
        way.enter()
        Decode(1, 32, STEPS).seconds(model, way.prepare)
        with torch.inference_mode():
            cache = model(input_ids=torch.zeros(1, 32, dtype=torch.long), use_cache=True).past_key_values
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(STEPS):
                    model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        way.leave()
        found[name] = {
            event.key: (event.count / STEPS, event.self_cpu_time_total / STEPS) for event in profiler.key_averages()
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Where the time of a decoding step goes: operators, how often they are called and how long they take."""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

from benchmarks.process import child
from benchmarks.speed import DTYPES
from benchmarks.table import markdown

EXPERTS, RANK, LAYERS, SHOWN = 4, 32, 8, 9
ROUNDS, STEPS = 6, 8
VARIANTS = ("base", "bare", "blend")


def measure() -> dict[str, Any]:
    """Each dtype in a process of its own."""
    return {"dtypes": {dtype: child("benchmarks.profiles", dtype) for dtype in DTYPES}}


def text(found: dict[str, Any]) -> str:
    """A table for each dtype in Markdown."""
    return "\n".join(f"{dtype}:\n\n{_table(variants)}" for dtype, variants in found["dtypes"].items())


def _table(variants: dict[str, dict[str, Any]]) -> str:
    operators = {name: found["operators"] for name, found in variants.items()}
    names = {name for own in operators.values() for name in own}
    longest = sorted(names, key=lambda name: -max(own.get(name, (0, 0))[1] for own in operators.values()))
    cells = [
        (f"`{name}`", *(_cell(*operators[variant].get(name, (0, 0))) for variant in VARIANTS))
        for name in longest[:SHOWN]
    ]
    rest = [
        _cell(*map(sum, zip(*(operators[variant].get(name, (0, 0)) for name in longest[SHOWN:]), strict=True)))
        for variant in VARIANTS
    ]
    together = [sum(self_us for _, self_us in operators[variant].values()) / 1e3 for variant in VARIANTS]
    cells += [("everything else", *rest)]
    cells += [("together", *(f"{ms:.2f}" for ms in together))]
    cells += [("a step without the profiler", *(f"{variants[variant]['ms']:.2f}" for variant in VARIANTS))]
    return markdown(("operator", *(f"{variant}: calls, ms" for variant in VARIANTS)), cells)


def _cell(calls: float, self_us: float) -> str:
    return f"{calls:.0f}, {self_us / 1e3:.2f}" if calls else "–"


def main(dtype: str) -> None:
    """Profile one dtype, the variants by turns, and print what each of them takes as JSON."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from lmoe_cli.bench import synthetic, variants
    from lmoe_cli.bench.work import Decode

    numbers = getattr(torch, dtype)
    model = synthetic.synthetic_model("qwen3-0.6b", LAYERS, numbers, torch.device("cpu"))
    bank = synthetic.synthetic_bank(model, EXPERTS, RANK, numbers)
    ways = dict(zip(VARIANTS, (variants.base(), variants.bare(model, bank), variants.blend(model, bank)), strict=True))
    times: dict[str, list[float]] = {name: [] for name in ways}
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            way.enter()
            times[name].append(Decode(1, 32, STEPS).seconds(model, way.prepare))
            with torch.inference_mode():
                cache = model(input_ids=torch.zeros(1, 32, dtype=torch.long), use_cache=True).past_key_values
                with profile(activities=[ProfilerActivity.CPU]) as profiler:
                    for _ in range(STEPS):
                        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            way.leave()
            for event in profiler.key_averages():
                own = sums[name].setdefault(event.key, [0.0, 0.0])
                own[0] += event.count / (ROUNDS * STEPS)
                own[1] += event.self_cpu_time_total / (ROUNDS * STEPS)
    found = {name: {"ms": statistics.median(times[name][1:]) * 1e3, "operators": sums[name]} for name in ways}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Memory that a prompt takes while it is computed, above the loaded model."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

from benchmarks.process import child, peak_mb
from benchmarks.table import markdown

LAYERS, RANK, TOKENS = 8, 32, 2048
WAYS = (
    ("base", 0), ("always on", 1), ("always on", 4), ("always on", 16), ("two per token", 4), ("two per token", 16),
    ("two per token", 64), ("PEFT", 4),
)  # fmt: skip


def measure() -> dict[str, Any]:
    """Each way in a process of its own."""
    told = [(way, count, child("benchmarks.activations", way, str(count))) for way, count in WAYS]
    return {"rows": [{"way": way, "experts": count, "mb": mb} for way, count, mb in told]}


def text(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    base = found["rows"][0]["mb"]
    cells = [
        (row["way"], str(row["experts"]), f"{row['mb']:.0f}", f"{row['mb'] - base:+.0f}" if row["experts"] else "")
        for row in found["rows"]
    ]
    return markdown(("experts", "number", "MB", "beside the base"), cells)


def main(way: str, experts: str) -> None:
    """Measure one way and print its MB."""
    import torch

    from lmoe_cli.bench import synthetic, variants
    from lmoe_cli.bench.work import prompt
    from lmoe_cli.engine.cache import last_only

    count = int(experts)
    model = synthetic.synthetic_model("qwen3-0.6b", LAYERS, torch.float32, torch.device("cpu"))
    if way == "PEFT":
        variant = variants.peft(model, variants.random_adapters(count, RANK))
    elif count:
        bank = synthetic.synthetic_bank(model, count, RANK, torch.float32)
        variant = variants.blend(model, bank, variants.Gating(2) if way == "two per token" else None)
    else:
        variant = variants.base()
    variant.enter()

    def compute(tokens: int) -> None:
        variant.prepare(1, tokens)
        with torch.inference_mode():
            model(input_ids=prompt(model, 1, tokens), use_cache=True, **last_only(model))

    compute(TOKENS // 8)  # what is made once is no activation
    print(json.dumps(peak_mb(partial(compute, TOKENS))))


if __name__ == "__main__":
    main(*sys.argv[1:])

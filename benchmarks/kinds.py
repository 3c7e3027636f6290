"""What DoRA, biases and mixed ranks cost in a blend, beside plain LoRA of the same rank in the same process."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.process import child
from benchmarks.speed import DTYPES
from benchmarks.table import at_least, markdown

EXPERTS, RANK, LAYERS, ROUNDS = 4, 32, 8, 21
LEAST = 0.97
SAID = {
    "lora": "plain LoRA",
    "dora": "DoRA, a magnitude for each row",
    "bias": "a bias for each row",
    "mixed": f"ranks from {RANK // 2} to {RANK * 3 // 2}",
    "all": "all of these together",
}


def measure() -> dict[str, Any]:
    """Every kind in every dtype, each dtype in a process of its own."""
    return {"rows": [row for dtype in DTYPES for row in child("benchmarks.kinds", dtype)]}


def text(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    head = ("experts", "dtype", "ms/token", "± quartiles", "of plain LoRA", "asked")
    cells = [
        (SAID[row["kind"]], row["dtype"], f"{row['ms_per_token']:.2f}", f"{row['spread']:.0%}",
         f"{row['ratio_to_base']:.3f}", "" if row["kind"] == "lora" else at_least(row["ratio_to_base"], LEAST, 3))
        for row in found["rows"]
    ]  # fmt: skip
    return markdown(head, cells)


def main(dtype: str) -> None:
    """Measure one dtype and print the rows as JSON."""
    import torch

    from lmoe_cli.bench import synthetic, variants
    from lmoe_cli.bench.measure import measure as timed
    from lmoe_cli.bench.work import Decode

    numbers = getattr(torch, dtype)
    model = synthetic.synthetic_model("qwen3-0.6b", LAYERS, numbers, torch.device("cpu"))
    banks = [synthetic.synthetic_bank(model, EXPERTS, RANK, numbers, kind) for kind in synthetic.KINDS]
    rows = timed(model, [variants.blend(model, bank) for bank in banks], Decode(1, 32, 8), ROUNDS)
    told = zip(synthetic.KINDS, rows, strict=True)
    print(json.dumps([{"kind": kind, "dtype": dtype, **asdict(row)} for kind, row in told]))


if __name__ == "__main__":
    main(*sys.argv[1:])

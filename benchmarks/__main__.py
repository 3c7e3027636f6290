"""Make docs/benchmarks.md."""

from __future__ import annotations

import datetime
from pathlib import Path

from benchmarks import bake, decode

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
TEXT = """# Benchmarks

Made by `make bench` on {date}: {device}, {threads} threads, {bandwidth_gb_s} GB/s by a copy, torch {torch},
transformers {transformers}, peft {peft}. Every ratio is against something run beside it; numbers of another machine
will differ.

## Decoding, batch 1

Eight layers of Qwen3-0.6B's shape with random weights and a small vocabulary, so that the output head does not drown
the layers; four experts of rank 32 on all linear layers. *Of base* is the median over rounds of the ratio within a
round; *byte limit* is what reading the experts' bytes beside the base's allows at most. `peft` runs PEFT's own active
adapters.

### float32

{layers_float32}
### bfloat16

{layers_bfloat16}
The whole of Qwen3-0.6B, with its head, in bfloat16:

{whole_bfloat16}
## Baking

{bake}
## On a GPU

No GPU was at hand for this version. `lmoe bench --synthetic qwen3-4b --dtype bfloat16 --experts 4 --rank 32 --peft`
makes the same table on one.
"""


def main() -> None:
    """Measure everything and write the page."""
    layers_float32, machine = decode.table(decode.LAYERS, "float32")
    parts = {
        "layers_float32": layers_float32,
        "layers_bfloat16": decode.table(decode.LAYERS, "bfloat16")[0],
        "whole_bfloat16": decode.table(decode.WHOLE, "bfloat16")[0],
        "bake": bake.table(),
    }
    PAGE.write_text(TEXT.format(date=datetime.date.today().isoformat(), **machine, **parts))


main()

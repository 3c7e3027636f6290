"""A few ratios, measured in a minute or two, that stop a change which makes the product slow.

The bounds are far outside the noise: a busy machine must not fail a change that is sound.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.process import lmoe_bench
from benchmarks.speed import DTYPES

LAYERS = ("--synthetic", "qwen3-0.6b", "--layers", "4", "--experts", "4", "--rank", "32", "--rounds", "7")
LEAST = {
    ("float32", "blend"): ("bare", 0.55),  # 0.75 on a quiet machine
    ("bfloat16", "blend"): ("bare", 0.55),  # 0.78
    ("float32", "folded"): ("base", 0.80),  # 1.0 or far more, as kernels were chosen
    ("bfloat16", "folded"): ("base", 0.80),
}
"""Dtype and variant → beside what, and the least speed of it. All kernels are those of the machine, chosen at load."""


def rows() -> list[dict[str, Any]]:
    """Every row that has a bound, with it."""
    found = []
    for dtype in DTYPES:
        measured = lmoe_bench(*LAYERS, "--dtype", dtype)["rows"]
        of_base = {row["variant"]: row["ratio_to_base"] for row in measured}
        for row in measured:
            beside, least = LEAST.get((dtype, row["variant"]), ("", 0.0))
            if beside and row["experts"] == 4:
                ratio = round(row["ratio_to_base"] / of_base[beside], 3)
                found.append({"dtype": dtype, **row, "beside": beside, "ratio": ratio, "least": least})
    return found


def main() -> None:
    """Print the rows as JSON, and fail where one is under its bound."""
    found = rows()
    print(json.dumps(found, indent=2))
    slow = [row for row in found if row["ratio"] < row["least"]]
    for row in slow:
        name = f"{row['dtype']} {row['variant']} of {row['experts']}"
        print(f"{name}: {row['ratio']:.2f} of {row['beside']}, at least {row['least']:.2f} asked", file=sys.stderr)
    if slow or len(found) != len(LEAST):
        sys.exit(1)


if __name__ == "__main__":
    main()

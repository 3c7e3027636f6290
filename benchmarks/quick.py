"""A few ratios, measured in a minute or two, that stop a change which makes the product slow.

The bounds are far outside the noise: a busy machine must not fail a change that is sound.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.decode import bench

LAYERS = ("--synthetic", "qwen3-0.6b", "--layers", "4", "--experts", "4", "--rank", "32", "--rounds", "7")
LEAST = {
    ("float32", "blend", 4): 0.60,  # 0.80 on a quiet machine
    ("bfloat16", "blend", 4): 0.50,  # 0.73
    ("float32", "folded", 4): 0.85,  # 1.00
    ("bfloat16", "folded", 4): 0.85,  # 1.00
}
"""Dtype, variant and experts → least speed of the base's."""


def rows() -> list[dict[str, Any]]:
    """Every row that has a bound, with it."""
    found = []
    for dtype in ("float32", "bfloat16"):
        for row in bench(*LAYERS, "--dtype", dtype)["rows"]:
            least = LEAST.get((dtype, row["variant"], row["experts"]))
            if least is not None:
                found.append({"dtype": dtype, **row, "least": least})
    return found


def main() -> None:
    """Print the rows as JSON, and fail where one is under its bound."""
    found = rows()
    print(json.dumps(found, indent=2))
    slow = [row for row in found if row["ratio_to_base"] < row["least"]]
    for row in slow:
        name = f"{row['dtype']} {row['variant']} of {row['experts']}"
        print(f"{name}: {row['ratio_to_base']:.2f} of the base, at least {row['least']:.2f} asked", file=sys.stderr)
    if slow or len(found) != len(LEAST):
        sys.exit(1)


if __name__ == "__main__":
    main()

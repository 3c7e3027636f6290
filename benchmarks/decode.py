"""Decoding speed of base, blend, folded blend and PEFT, as `lmoe bench` measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

LAYERS = ("--synthetic", "qwen3-0.6b", "--layers", "8", "--experts", "4", "--rank", "32", "--peft")
WHOLE = ("--synthetic", "qwen3-0.6b", "--experts", "4", "--rank", "32", "--rounds", "9")


def bench(*arguments: str) -> dict[str, Any]:
    """What `lmoe bench --json` tells."""
    command = [sys.executable, "-m", "lmoe_cli", "bench", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    data: dict[str, Any] = json.loads(done.stdout)["data"]
    return data


def table(arguments: tuple[str, ...], dtype: str) -> tuple[str, dict[str, Any]]:
    """A table as Markdown, and the machine it was made on."""
    data = bench(*arguments, "--dtype", dtype)
    head = "| variant | experts | tokens/s | ms/token | of base | byte limit |\n"
    head += "| --- | ---: | ---: | ---: | ---: | ---: |\n"
    rows = "".join(
        f"| {row['variant']} | {row['experts']} | {row['tokens_per_s']:.1f} | {row['ms_per_token']:.2f} "
        f"| {row['ratio_to_base']:.2f} | {row['byte_limit']:.2f} |\n"
        for row in data["rows"]
    )
    return head + rows, data["machine"]

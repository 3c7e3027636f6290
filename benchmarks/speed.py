"""Tokens per second of base, blends, folded blend and PEFT, as `lmoe bench` measures them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.process import lmoe_bench
from benchmarks.table import at_least, at_most, markdown

DTYPES = ("float32", "bfloat16")
WHOLE = ("--synthetic", "qwen3-0.6b")
LAYERS = (*WHOLE, "--layers", "8")
Row = dict[str, Any]
Target = Callable[[Row], float | None]
"""Least speed of a row, relative to the base."""


def _of_limit(share: float) -> Target:
    """A share of what the bytes (of a prompt: the arithmetic) of the experts allow."""
    return lambda row: share * row["byte_limit"]


@dataclass(frozen=True)
class Speed:
    """One table: a call of `lmoe bench`."""

    title: str
    """Perhaps with ``{experts}``: the most that were measured."""
    arguments: tuple[str, ...]
    target: Target | None
    most_growth: float | None = None
    """Where cost should hardly grow with experts: the time that many may take, of that with a few."""

    def measure(self) -> dict[str, Any]:
        """Run it."""
        return lmoe_bench(*self.arguments)

    def text(self, found: dict[str, Any]) -> str:
        """The table in Markdown, under its title."""
        rows = found["rows"]
        table = _growth(rows, self.most_growth) if self.most_growth else _table(rows, self.target)
        title = self.title.format(experts=max(row["experts"] for row in rows))
        return f"### {title}\n\n{table}\n"


def _table(rows: list[Row], target: Target | None) -> str:
    bare_ms = next((row["ms_per_token"] for row in rows if row["variant"] == "bare"), None)
    head = ("variant", "experts", "tokens/s", "ms/token", "± quartiles", "of base", "of bare", "limit", "asked")
    cells = []
    for row in rows:
        asked = target(row) if target and row["variant"] == "blend" else None
        of_bare = f"{bare_ms / row['ms_per_token']:.2f}" if bare_ms and row["variant"] != "base" else ""
        cells.append(
            (row["variant"], str(row["experts"]), f"{row['tokens_per_s']:.1f}", f"{row['ms_per_token']:.2f}",
             f"{row['spread']:.0%}", f"{row['ratio_to_base']:.2f}", of_bare, f"{row['byte_limit']:.2f}",
             at_least(row["ratio_to_base"], asked))
        )  # fmt: skip
    return markdown(head, cells)


def _growth(rows: list[Row], most: float) -> str:
    times = {row["experts"]: row["ms_per_token"] for row in rows if row["variant"] == "blend"}
    few = times[SPARSE[0]]
    cells = [("0, the base", f"{rows[0]['ms_per_token']:.2f}", "", "")]
    for number in SPARSE:
        ratio = times[number] / few
        asked = at_most(ratio, most if number > SPARSE[0] else None)
        cells.append((str(number), f"{times[number]:.2f}", f"{ratio:.2f}", asked))
    return markdown(("experts", "ms/token", f"of {SPARSE[0]} experts", "asked"), cells)


def _always_on(dtype: str, rank: int) -> Target:
    stated = {"float32": 0.85, "bfloat16": 0.81}

    def target(row: Row) -> float | None:
        return stated[dtype] if (rank, row["experts"]) == (32, 4) else 0.95 * row["byte_limit"]

    return target


def _always_on_tables(dtype: str) -> dict[str, Speed]:
    found = {}
    for rank, experts, extra in ((32, 4, ("--peft",)), (32, 8, ()), (8, 8, ())):
        numbers = ("--dtype", dtype, "--experts", str(experts), "--rank", str(rank))
        found[f"decode-{dtype}-{experts}x{rank}"] = Speed(
            f"{dtype}, up to {{experts}} experts of rank {rank}", (*LAYERS, *numbers, *extra), _always_on(dtype, rank)
        )
    return found


def _eight_experts(name: str, shape: tuple[str, ...], dtype: str, *extra: str) -> dict[str, Speed]:
    """Tables of up to 8 experts, of either rank."""
    found = {}
    for rank in (32, 8):
        numbers = ("--dtype", dtype, "--experts", "8", "--rank", str(rank), "--rounds", "9")
        found[f"{name}-{dtype}-8x{rank}"] = Speed(
            f"{dtype}, up to {{experts}} experts of rank {rank}", (*shape, *numbers, *extra), _always_on(dtype, rank)
        )
    return found


FOUR = ("--experts", "4", "--rank", "32")
TOP_TWO = ("--experts", "64", "--rank", "16", "--top", "2")
SPARSE = (4, 16, 64)
"""Of the numbers of experts that are measured there, those that are shown."""

GROUPS: dict[str, dict[str, Speed]] = {
    "decode": _always_on_tables("float32"),
    "decode_bfloat16": _always_on_tables("bfloat16"),
    "whole": _eight_experts("whole", WHOLE, "float32"),
    "whole_bfloat16": _eight_experts("whole", WHOLE, "bfloat16"),
    "batch": {
        f"batch-{dtype}-{rows}": Speed(
            f"{dtype}, {rows} rows, a blend of its own for each",
            (*LAYERS, "--dtype", dtype, *FOUR, "--batch", str(rows), "--per-row", "--rounds", "9"),
            _of_limit(0.9),
        )
        for dtype in DTYPES
        for rows in (8, 32)
    },
    "prefill": {
        f"prefill-{dtype}-{tokens}": Speed(
            f"{dtype}, {tokens} tokens",
            (*LAYERS, "--dtype", dtype, *FOUR, "--prefill", str(tokens), "--rounds", "5", "--peft"),
            _of_limit(1 / 1.1),
        )
        for dtype in DTYPES
        for tokens in (512, 2048)
    },
    "sparse": {
        **{
            f"sparse-{dtype}-decode": Speed(
                f"{dtype}, decoding", (*LAYERS, "--dtype", dtype, *TOP_TWO, "--rounds", "9"), None, 1.10
            )
            for dtype in DTYPES
        },
        **{
            f"sparse-{dtype}-prefill": Speed(
                f"{dtype}, a prompt of 1024 tokens",
                (*LAYERS, "--dtype", dtype, *TOP_TWO, "--prefill", "1024", "--rounds", "3"),
                None,
                1.50,
            )
            for dtype in DTYPES
        },
    },
    "compiled": _eight_experts("compiled", LAYERS, "float32", "--compile"),
    "compiled_bfloat16": _eight_experts("compiled", LAYERS, "bfloat16", "--compile"),
    "compiled_whole": _eight_experts("compiled-whole", WHOLE, "float32", "--compile"),
    "compiled_whole_bfloat16": _eight_experts("compiled-whole", WHOLE, "bfloat16", "--compile"),
    "quantised": {
        f"quantised-{kind}": Speed(
            f"{kind}, products in bfloat16",
            (*LAYERS, "--dtype", "bfloat16", *FOUR, "--quantize", kind, "--rounds", "9"),
            _of_limit(0.9),
        )
        for kind in ("nf4", "int8")
    },
}
"""Section of the page → name of a table → how it is made."""

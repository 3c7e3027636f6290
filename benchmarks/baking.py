"""Baking four experts of rank 16 into real shapes, against a copy of the base's files and against PEFT."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import write_adapter, write_base
from benchmarks.process import Run, run
from benchmarks.table import at_most, markdown

EXPERTS, RANK = 4, 16
MOST_MEMORY = 1 << 30
WITH_TORCH = "import torch, safetensors, transformers"
PEFT = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, out, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
wrapped = PeftModel.from_pretrained(model, adapters[0], adapter_name="e0")
for number, adapter in enumerate(adapters[1:], start=1):
    wrapped.load_adapter(adapter, adapter_name=f"e{number}")
names = [f"e{number}" for number in range(len(adapters))]
wrapped.merge_and_unload(adapter_names=names).save_pretrained(out)
"""
COPY, FIRST, AGAIN, FUSED, WITH_PEFT = "copy", "first", "again", "fused", "peft"
SAID = {
    COPY: "`cp -r` of the base",
    FIRST: "`lmoe bake`, of a base it never saw",
    AGAIN: "`lmoe bake`, again",
    FUSED: "`lmoe bake --rounding fused`, again",
    WITH_PEFT: "PEFT, `merge_and_unload` and `save_pretrained`",
    "ties": "`lmoe bake --method ties`",
    "dare": "`lmoe bake --method dare`",
}
TARGETS = {FIRST: 1.5, AGAIN: 1.5, FUSED: 1.5, "ties": 4.0, "dare": 4.0}
METHODS = ("ties", "dare")


@dataclass(frozen=True)
class Case:
    """A base, and what is run on it."""

    title: str
    shape: str
    dtype: str
    ways: tuple[str, ...]
    rounds: int
    once: tuple[str, ...] = ()
    """Ways that run in the first round alone."""


CASES = {
    "4b-bf16": Case(
        "4B shape, bfloat16", "qwen3-4b", "bfloat16", (COPY, FIRST, AGAIN, FUSED, WITH_PEFT), 3, (WITH_PEFT,)
    ),
    "8b-bf16": Case("8B shape, bfloat16", "qwen3-8b", "bfloat16", (COPY, FIRST, AGAIN), 2),
    "4b-f16": Case("4B shape, float16", "qwen3-4b", "float16", (COPY, FIRST, AGAIN), 1),
    "4b-f32": Case("4B shape, float32", "qwen3-4b", "float32", (COPY, FIRST, AGAIN), 1),
    "4b-methods": Case("4B shape, bfloat16, task vectors", "qwen3-4b", "bfloat16", (COPY, *METHODS), 1),
}


def measure() -> dict[str, Any]:
    """Every case, one after the other; only one base lies on the disk at a time."""
    idle = run(sys.executable, "-c", WITH_TORCH).anonymous_bytes
    return {"idle_bytes": idle, "cases": {name: _measure(case) for name, case in CASES.items()}}


def _measure(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lmoe-bench-") as temporary:
        folder = Path(temporary)
        base, out = write_base(folder / "base", case.shape, case.dtype), folder / "out"
        adapters = [write_adapter(folder / f"adapter{number}", case.shape, RANK, number) for number in range(EXPERTS)]
        found: dict[str, list[Run]] = {way: [] for way in case.ways}
        reports: dict[str, Any] = {}
        for number in range(case.rounds):
            for way in case.ways:
                if way in case.once and number:
                    continue
                found[way].append(run(*_command(way, base, out, adapters), cache=folder / f"cache{number}"))
                report = out / "bake-report.json"
                reports[way] = json.loads(report.read_text())["rounding"] if report.is_file() else None
                shutil.rmtree(out)
        size = sum(path.stat().st_size for path in base.iterdir())
    return {
        "bytes": size,
        "runs": {way: [run_._asdict() for run_ in runs] for way, runs in found.items()},
        "rounding": {way: report for way, report in reports.items() if report},
        "case": asdict(case),
    }


def _command(way: str, base: Path, out: Path, adapters: list[Path]) -> list[str | Path]:
    if way == COPY:
        return ["cp", "-r", base, out]
    if way == WITH_PEFT:
        return [sys.executable, "-c", PEFT, base, out, *adapters]
    experts = [word for number, path in enumerate(adapters) for word in ("--expert", f"e{number}={path}:0.25")]
    extra = {FUSED: ["--rounding", "fused"]} | {method: ["--method", method] for method in METHODS}
    return [sys.executable, "-m", "lmoe_cli", "bake", "--base", base, *experts, *extra.get(way, ()), "--out", out]


def text(found: dict[str, Any]) -> str:
    """The tables in Markdown."""
    idle = found["idle_bytes"]
    said = (
        f"{EXPERTS} experts of rank {RANK} on all linear layers; medians of interleaved runs of whole programs, in "
        "brackets the least and the most. Memory is the peak of anonymous memory above the "
        f"{idle / 1e9:.2f} GB that an interpreter with torch and transformers holds. Every bake hashes what it "
        "writes, and what it reads unless it did before and the file did not change since. A bake ends when the disk "
        "has everything; a copy may end before.\n\n"
    )
    return said + "\n".join(_table(case, idle) for case in found["cases"].values())


def _spread(values: list[float], digits: int) -> str:
    """Their median, and where there are several the smallest and the largest."""
    said = f"{statistics.median(values):.{digits}f}"
    return f"{said} ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else said


def _table(found: dict[str, Any], idle: int) -> str:
    copies = [run_["seconds"] for run_ in found["runs"][COPY]]
    cells = []
    for way, runs in found["runs"].items():
        seconds = [run_["seconds"] for run_ in runs]
        ratios = [own / copy for own, copy in zip(seconds, copies, strict=False)]
        ratio = statistics.median(ratios)
        above = max(run_["anonymous_bytes"] for run_ in runs) - idle
        memory = "" if way == COPY else f"{max(0, above) / 1e9:.2f} GB"
        if way in TARGETS and above > MOST_MEMORY:
            memory += ", **over 1 GiB**"
        differing = found["rounding"].get(way, {}).get("differing")
        share = "" if differing is None else f"{differing:.1e}"
        cells.append(
            (
                SAID[way],
                _spread(seconds, 1),
                _spread(ratios, 2),
                at_most(ratio, TARGETS.get(way)),
                memory,
                share,
            )
        )
    head = ("", "seconds", "of `cp`", "asked", "memory", "rounded otherwise")
    size = f"{found['bytes'] / 1e9:.1f} GB"
    often = "once each" if found["case"]["rounds"] == 1 else f"{found['case']['rounds']} rounds"
    return f"### {found['case']['title']}, {size}, {often}\n\n{markdown(head, cells)}"

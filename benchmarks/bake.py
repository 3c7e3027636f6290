"""Baking a 4B-shaped base with four experts of rank 16, against a copy of its files and against PEFT."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoint import write_adapter, write_base
from benchmarks.process import Run, run

SHAPE, EXPERTS, RANK, ROUNDS = "qwen3-4b", 4, 16, 3
WITH_TORCH = "import torch, safetensors, transformers"
PEFT = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, out, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
wrapped = PeftModel.from_pretrained(model, adapters[0], adapter_name="e0")
for number, adapter in enumerate(adapters[1:], start=1):
    wrapped.load_adapter(adapter, adapter_name=f"e{number}")
names = [f"e{number}" for number in range(len(adapters))]
wrapped.merge_and_unload(adapter_names=names).save_pretrained(out)
"""


def table() -> str:
    """The table as Markdown."""
    with tempfile.TemporaryDirectory(prefix="lmoe-bench-") as temporary:
        folder = Path(temporary)
        base = write_base(folder / "base", SHAPE)
        adapters = [write_adapter(folder / f"adapter{number}", SHAPE, RANK, number) for number in range(EXPERTS)]
        experts = [word for number, path in enumerate(adapters) for word in ("--expert", f"e{number}={path}:0.25")]
        lmoe = [sys.executable, "-m", "lmoe_cli", "bake", "--base", base, *experts, "--out", folder / "out"]
        commands: dict[str, list[str | Path]] = {
            "`cp -r` of the base": ["cp", "-r", base, folder / "out"],
            "`lmoe bake`, of a base it never saw": [*lmoe],
            "`lmoe bake`, again": [*lmoe],
            "PEFT, `merge_and_unload` and `save_pretrained`": [
                sys.executable, "-c", PEFT, base, folder / "out", *adapters,
            ],
        }  # fmt: skip
        found: dict[str, list[Run]] = {name: [] for name in commands}
        for round_ in range(ROUNDS):
            for name, command in commands.items():
                found[name].append(run(*command, cache=folder / f"cache{round_}"))
                shutil.rmtree(folder / "out")
        idle = run(sys.executable, "-c", WITH_TORCH).anonymous_bytes
        size = sum(path.stat().st_size for path in base.iterdir())
    rows = [_row(name, runs, found["`cp -r` of the base"], idle) for name, runs in found.items()]
    head = "| | seconds | of `cp` | peak anonymous memory |\n| --- | ---: | ---: | ---: |\n"
    said = f"{size / 1e9:.1f} GB in bfloat16, {EXPERTS} experts of rank {RANK} on all linear layers. "
    said += f"Medians of {ROUNDS} interleaved runs of whole programs; memory above the {idle / 1e9:.2f} GB that an "
    said += (
        "interpreter with torch and transformers holds. Every bake hashes what it writes, and what it reads unless it "
    )
    said += "did before and the file did not change since. "
    said += "A bake ends when the disk has everything; the copy may end before.\n\n"
    return said + head + "".join(rows)


def _row(name: str, runs: list[Run], copies: list[Run], idle: int) -> str:
    seconds = statistics.median(run.seconds for run in runs)
    ratio = statistics.median(one.seconds / other.seconds for one, other in zip(runs, copies, strict=True))
    memory = max(run.anonymous_bytes for run in runs)
    above = f"{max(0, memory - idle) / 1e9:.2f} GB" if "cp" not in name else "–"
    return f"| {name} | {seconds:.1f} | {ratio:.2f} | {above} |\n"

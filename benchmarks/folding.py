"""Folding a blend into a 4B-shaped base in memory and out of it again, beside reading the base's files."""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import write_adapter, write_base
from benchmarks.process import child
from benchmarks.table import at_most, markdown

SHAPE, EXPERTS, RANK, ROUNDS = "qwen3-4b", 4, 16, 3
MOST = 1.5
BLOCK_BYTES = 8 << 20


def measure() -> dict[str, Any]:
    """Write base and adapters, and measure in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="lmoe-bench-") as temporary:
        folder = Path(temporary)
        base = write_base(folder / "base", SHAPE)
        adapters = [write_adapter(folder / f"adapter{number}", SHAPE, RANK, number) for number in range(EXPERTS)]
        found: dict[str, Any] = child("benchmarks.folding", base, *adapters)
        return found


def text(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    read = statistics.median(found["read_s"])
    first, *later = found["fold_s"]
    rows = [
        ("reading the base's files, in the page cache", read, None),
        ("folding, the first time", first, MOST),
        ("folding again", statistics.median(later), MOST),
        ("unfolding", statistics.median(found["unfold_s"]), MOST),
    ]
    cells = [
        (name, f"{seconds:.2f}", f"{seconds / read:.2f}", at_most(seconds / read, most)) for name, seconds, most in rows
    ]
    said = f"{found['base_bytes'] / 1e9:.1f} GB in bfloat16, {EXPERTS} experts of rank {RANK} on all linear layers. "
    said += f"Anonymous memory: {found['anonymous_before'] / 1e9:.2f} GB before, "
    said += f"{found['anonymous_folded'] / 1e9:.2f} GB folded. Unfolded, every weight was "
    said += f"{'equal to the last bit' if found['is_equal'] else '**NOT EQUAL**'}.\n\n"
    return said + markdown(("", "seconds", "of reading", "asked"), cells)


def main(base: str, *adapters: str) -> None:
    """Measure and print what was found as JSON."""
    from lmoe_cli.engine.build import start
    from lmoe_cli.loadout.loadout import resolve
    from lmoe_cli.loadout.recipe import Recipe

    experts = {f"e{number}": {"adapter": path, "weight": 0.25} for number, path in enumerate(adapters)}
    recipe = Recipe.model_validate({"base": base, "experts": experts})
    files = sorted(Path(base).glob("*.safetensors"))
    engine = start(resolve(recipe, "benchmark"), dtype="bfloat16")
    before = _hashes(engine.model)
    found: dict[str, Any] = {"read_s": [], "fold_s": [], "unfold_s": []}
    found |= {"base_bytes": sum(path.stat().st_size for path in files), "anonymous_before": _anonymous()}
    for _ in range(ROUNDS):
        found["read_s"].append(_seconds(lambda: _read(files)))
        found["fold_s"].append(_seconds(engine.fold))
        found["anonymous_folded"] = _anonymous()
        found["unfold_s"].append(_seconds(engine.unfold))
        found["is_equal"] = found.get("is_equal", True) and before == _hashes(engine.model)
    print(json.dumps(found))


def _hashes(model: Any) -> dict[str, bytes]:
    """The hash of each weight that the model has now: folding may put others in the place of those before."""
    import torch

    bits = {name: weight.detach().view(torch.uint8).numpy() for name, weight in model.named_parameters()}
    return {name: hashlib.blake2b(array.data).digest() for name, array in bits.items()}


def _seconds(act: Any) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _read(files: list[Path]) -> None:
    block = bytearray(BLOCK_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main(*sys.argv[1:])

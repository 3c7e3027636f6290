"""Measure and write docs/benchmarks.md: `python -m benchmarks [SECTION…]`, everything but `gpu` when none is named."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import (
    activations,
    baking,
    folding,
    gpu,
    kinds,
    page,
    profiles,
    results,
    routed,
    speed,
    starting,
    training,
)
from lmoe_cli.bench.machine import machine


def _speeds(group: str) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        found = {}
        for name, table in speed.GROUPS[group].items():
            started = time.perf_counter()
            found[name] = table.measure()
            print(f"  {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return found

    return measure


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    **{group: _speeds(group) for group in speed.GROUPS},
    "activations": activations.measure,
    "kinds": kinds.measure,
    "profile": profiles.measure,
    "fold": folding.measure,
    "start": starting.measure,
    "bake": baking.measure,
    "routed": routed.measure,
    "training": training.measure,
    "gpu": gpu.measure,
}


def main(*named: str) -> None:
    """Measure sections and write the page from all that was measured so far."""
    unknown = set(named) - set(SECTIONS)
    if unknown:
        sys.exit(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in named or (name for name in SECTIONS if name != "gpu"):
        started = time.perf_counter()
        print(name, file=sys.stderr, flush=True)
        device = gpu.DEVICE if name == "gpu" else "cpu"
        results.keep(name, SECTIONS[name](), machine(torch.device(device)))
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    page.PATH.write_text(page.page(results.load()))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = 256 << 20


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads, memory bandwidth by a copy, and versions."""
    return {
        "device": _name(device),
        "threads": torch.get_num_threads(),
        "bandwidth_gb_s": round(_bandwidth(device), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "lmoe": version("lmoe-cli"),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{named or platform.processor() or platform.machine()}, {os.cpu_count()} cores, {instructions}"


def _bandwidth(device: torch.device) -> float:
    """Gigabytes read and written per second while a large block is copied."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * COPY_BYTES / best / 1e9

"""Write a trained gate. See `loadout.trained` for the format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmoe_cli import files
from lmoe_cli.checkpoint.raw import raw
from lmoe_cli.checkpoint.writer import Shape, ShardWriter
from lmoe_cli.loadout.trained import CONFIG, FORMAT, STEM, GateSettings


def write_gate(
    folder: Path,
    weights: Mapping[str, tuple[Tensor, Tensor]],
    settings: GateSettings,
    *,
    experts: Mapping[str, str],
    base: tuple[str, str],
    data: Mapping[str, str] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a gate into an existing folder; the config, which makes it one, last.

    Args:
        folder: Where to.
        weights: Place → W_r (E, d) and b (E,), float32; one row more with a zero expert.
        settings: What it was trained with.
        experts: Expert's name → its `loadout.trained.weights_hash`, in the order of the rows.
        base: Name and fingerprint of the base.
        data: File → SHA-256 of what it was trained on.
        metrics: What came of the training.
    """
    tensors = {f"{place}.weight": weight for place, (weight, _) in weights.items()}
    tensors |= {f"{place}.bias": bias for place, (_, bias) in weights.items()}
    shapes = {name: Shape("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(folder / f"{STEM}.safetensors", shapes, {"format": "pt"}) as file:
        for tensor in tensors.values():
            file.write(raw(tensor.to("cpu", torch.float32).contiguous()))
    config = {
        "format": FORMAT,
        "type": "gate",
        "settings": settings.model_dump(mode="json"),
        "experts": dict(experts),
        "base": {"name": base[0], "fingerprint": base[1]},
        "data": dict(data or {}),
        "metrics": dict(metrics or {}),
    }
    files.write_file(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")

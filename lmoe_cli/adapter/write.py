"""Write a LoRA adapter in PEFT's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmoe_cli import files
from lmoe_cli.adapter.adapter import STEM
from lmoe_cli.adapter.config import CONFIG
from lmoe_cli.checkpoint.writer import Shape, ShardWriter

ROOT = "base_model.model."
ENDINGS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_B_bias": "lora_B.bias",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
    "saved_weight": "weight",
    "saved_bias": "bias",
}
"""Role → how PEFT ends the tensor's name; the inverse of `names.place`."""


class Entry(NamedTuple):
    """A tensor to be written."""

    module: str
    role: str
    shape: Shape
    data: bytes | memoryview


def stored_name(module: str, role: str) -> str:
    """The name under which PEFT stores a role of a module."""
    return f"{ROOT}{module}.{ENDINGS[role]}"


def lora_config(
    base: str,
    ranks: Mapping[str, int],
    targets: Iterable[str],
    *,
    saved: Iterable[str] = (),
    use_dora: bool = False,
    lora_bias: bool = False,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """An ``adapter_config.json`` in which every module's scaling is 1.

    Args:
        base: The base's name.
        ranks: Module → rank.
        targets: What to put under ``target_modules``.
        saved: What to put under ``modules_to_save``.
        use_dora: Every module has a magnitude.
        lora_bias: Every module has a bias on B.
        fan_in_fan_out: The base keeps its weights transposed.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {module: rank for module, rank in ranks.items() if rank != usual}
    # PEFT adapts the router of a mixture, which is no linear layer, by its parameter's name.
    pattern |= {f"{module}.weight": rank for module, rank in pattern.items() if module.endswith(".gate")}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_dora": use_dora,
        "use_rslora": False,
        "lora_bias": lora_bias,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
    }


def write_adapter(folder: Path, config: Mapping[str, Any], entries: list[Entry]) -> str:
    """Write config and weights into an existing folder.

    Returns:
        SHA-256 of the weight file, in hexadecimal.
    """
    named = {stored_name(entry.module, entry.role): entry for entry in entries}
    shapes = {name: entry.shape for name, entry in named.items()}
    with ShardWriter(folder / f"{STEM}.safetensors", shapes, {"format": "pt"}) as file:
        for entry in named.values():
            file.write(entry.data)
    files.write_file(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    return file.sha256

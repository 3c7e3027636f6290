"""Adapters made byte by byte, without torch or PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmoe_cli.checkpoint.writer import Shape, header_bytes

ROOT = "base_model.model.model.layers"


def safetensors(tensors: Mapping[str, tuple[int, ...]], *, dtype: str = "F32", fill: int = 1) -> bytes:
    """A safetensors file of these shapes."""
    shapes = {name: Shape(dtype, sides) for name, sides in tensors.items()}
    return header_bytes(shapes, {"format": "pt"}) + bytes([fill]) * sum(shape.size for shape in shapes.values())


def factors(rank: int = 4, layers: int = 2, width: int = 8, modules: tuple[str, ...] = ("q_proj", "v_proj")) -> dict:
    """Names and shapes of a LoRA's tensors."""
    return {
        f"{ROOT}.{layer}.self_attn.{module}.lora_{side}.weight": (rank, width) if side == "A" else (width, rank)
        for layer in range(layers)
        for module in modules
        for side in "AB"
    }


def config(**changes: Any) -> dict[str, Any]:
    """An ``adapter_config.json`` as PEFT writes it, in short."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "acme/base",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    } | changes


def adapter(rank: int = 4, fill: int = 1, **changes: Any) -> dict[str, bytes]:
    """The files of an adapter, by name."""
    return {
        "adapter_config.json": json.dumps(config(r=rank) | changes).encode(),
        "adapter_model.safetensors": safetensors(factors(rank), fill=fill),
    }


def sharded(rank: int = 4) -> dict[str, bytes]:
    """An adapter in two weight files."""
    names = factors(rank)
    files = {name: f"adapter_model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    shards = {
        shard: safetensors({name: names[name] for name, file in files.items() if file == shard})
        for shard in sorted(set(files.values()))
    }
    index = {"metadata": {}, "weight_map": files}
    config_file = {"adapter_config.json": json.dumps(config(r=rank)).encode()}
    return {**config_file, "adapter_model.safetensors.index.json": json.dumps(index).encode(), **shards}


def base(layers: int = 2, width: int = 8, vocabulary: int = 16) -> dict[str, bytes]:
    """The files of a llama, by name."""
    linears = {
        f"model.layers.{layer}.self_attn.{name}_proj.weight": (width, width)
        for layer in range(layers)
        for name in "qkvo"
    }
    settings = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {
        "config.json": json.dumps(settings).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors({"model.embed_tokens.weight": (vocabulary, width), **linears}),
    }


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files into a folder and return it."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder

"""An adapter in a few facts: what ``lmoe inspect adapter`` tells."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from lmoe_cli.adapter.adapter import Adapter
from lmoe_cli.adapter.config import LORA
from lmoe_cli.adapter.names import EMBEDDINGS, HEADS, layer_of, place
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.index import Stored

DOWN = re.compile(r"\.lora_A(\.weight)?\Z")
QUANTIZED = ("bnb-4bit", "bnb-8bit", "4bit", "8bit", "gptq", "awq", "int4", "int8", "fp8", "gguf", "exl2", "hqq")


def summary(adapter: Adapter) -> dict[str, Any]:
    """What ``lmoe inspect adapter --json`` tells, under ``data``."""
    config, made = adapter.config, adapter.parts
    ranks = [part.rank for part in made.values() if part.rank]
    scalings = [part.scaling for part in made.values() if part.rank]
    if not ranks:  # without a usable config the shapes still tell the rank
        downs = [tensor.info.shape for name, tensor in adapter.stored.items() if DOWN.search(name)]
        ranks = [shape[0] for shape in downs if len(shape) == 2]
    modules = list(made) or _modules(adapter)
    adapted = [name for name in modules if name not in made or made[name].kind != "saved"]
    return {
        "ref": adapter.ref,
        "revision": adapter.source.revision,
        "path": str(adapter.source.path) if adapter.source.path else None,
        "peft_type": config.peft_type if config else None,
        "base": config.base if config else None,
        "task_type": config.task_type if config else None,
        "rank": {
            "min": min(ranks, default=None),
            "max": max(ranks, default=None),
            "default": config.r if config else None,
        },
        "alpha": config.default_alpha if config else None,
        "scaling": {"min": min(scalings, default=None), "max": max(scalings, default=None)},
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}) if made else _declared(adapter),
        "modules": len(modules),
        "layers": sorted({layer for name in modules if (layer := layer_of(name)) is not None}),
        "variants": _variants(adapter),
        "modules_to_save": sorted(set(config.modules_to_save)) if config else [],
        "tensors": len(adapter.stored),
        "parameters": sum(tensor.info.elements for tensor in adapter.stored.values()),
        "bytes": adapter.size,
        "dtypes": dict(sorted(Counter(_dtype(tensor) for tensor in adapter.stored.values()).items())),
        "format": adapter.format,
        "supported": adapter.is_supported,
    }


def _modules(adapter: Adapter) -> list[str]:
    """Modules by the names of the tensors, where lmoe cannot run them; AdaLoRA and others name them as LoRA does."""
    places = [place(DOWN.sub(".lora_A.weight", name)) for name in adapter.stored]
    return sorted({found.module for found in places if found and found.module})


def _declared(adapter: Adapter) -> list[str]:
    """Targets as the config names them, where the tensors cannot tell."""
    targets = adapter.config.target_modules if adapter.config else None
    if not targets:
        return sorted({name.rpartition(".")[2] for name in _modules(adapter)})
    return [targets] if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets})


def _dtype(tensor: Stored) -> str:
    return FLOATS.get(tensor.info.dtype, tensor.info.dtype.lower())


def _variants(adapter: Adapter) -> list[str]:
    config, made = adapter.config, adapter.parts.values()
    if config is None:
        return []
    saved = any(part.kind == "saved" and "saved_weight" in part.tensors for part in made)
    lora = config.peft_type == LORA
    present = {
        "rslora": lora and config.use_rslora,
        "dora": any(part.is_dora for part in made) or (lora and config.use_dora),
        "bias": any("saved_bias" in part.tensors and "saved_weight" not in part.tensors for part in made),
        "lora_bias": any("lora_B_bias" in part.tensors for part in made),
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
        "modules_to_save": saved or bool(config.modules_to_save),
        "embeddings": any(part.module.rpartition(".")[2] in EMBEDDINGS + HEADS for part in made),
        "fused_experts": any(part.experts > 1 for part in made) or bool(config.target_parameters),
        "base_changing_init": config.base_changing_init is not None,
        "quantized_base": quantization_in_name(config.base) is not None,
    }
    return [name for name, is_there in present.items() if is_there]


def quantization_in_name(base: str | None) -> str | None:
    """The quantisation that a base's name announces, such as ``bnb-4bit``."""
    name = (base or "").lower()
    return next((mark for mark in QUANTIZED if mark in name), None)

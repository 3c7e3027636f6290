"""Adapters from given factors, and comparisons of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lmoe_cli.similarity.compare import compare
from lmoe_cli.similarity.plan import Plan, by_name, read_experts
from lmoe_cli.similarity.report import report
from tests.adapter import made

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (r, d_in) and B (d_out, r)."""


def module(layer: int = 0, kind: str = "q_proj") -> str:
    return f"model.layers.{layer}.self_attn.{kind}"


def write(folder: Path, factors: Mapping[str, Factors], root: str = "base_model.model.", **config: Any) -> Path:
    """An adapter whose every module has scaling 1, unless the config says otherwise."""
    folder.mkdir()
    rank = next(iter(factors.values()))[0].shape[0]
    patterns = {name: a.shape[0] for name, (a, _) in factors.items() if a.shape[0] != rank}
    told = {"r": rank, "lora_alpha": rank, "rank_pattern": patterns, "alpha_pattern": patterns} | config
    (folder / "adapter_config.json").write_text(json.dumps(made.config(**told)))
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"{root}{name}.lora_A.weight"] = a.clone()
        tensors[f"{root}{name}.lora_B.weight"] = b.contiguous().clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def random(rank: int = 3, d_out: int = 10, d_in: int = 8, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)


def plan(*folders: Path) -> Plan:
    return by_name(read_experts({folder.name: str(folder) for folder in folders}))


def compared(*folders: Path) -> dict[str, Any]:
    """What the command would tell about adapters without their base."""
    chosen = plan(*folders)
    return report(chosen, compare(chosen))


def pair(*folders: Path) -> dict[str, Any]:
    """The only pair of two adapters, over all modules."""
    (found,) = compared(*folders)["overall"]["pairs"]
    return found

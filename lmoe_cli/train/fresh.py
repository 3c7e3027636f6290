"""Experts that know nothing yet: A at random, B at 0, so that they change nothing.

A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))       kaiming, as PEFT begins         He et al. 2015, sec. 2.2, arXiv 1502.01852
A ~ N(0, 1/r)                            gaussian                        Hu et al. 2021, sec. 4.1, arXiv 2106.09685
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmoe_cli.adapter.write import Entry, lora_config, write_adapter
from lmoe_cli.bank.tree import input_width, is_transposed, linear_layers
from lmoe_cli.checkpoint.raw import raw
from lmoe_cli.checkpoint.writer import Shape
from lmoe_cli.engine.base_model import empty_model
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.base import Base
from lmoe_cli.train.config import TrainedExpert

WORDS = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward", "fc1", "fc2", "block_sparse_moe")}


def write_fresh(folder: Path, base: Base, expert: TrainedExpert, seed: int, *, trust_remote_code: bool = False) -> None:
    """Write a fresh expert as an adapter into an existing folder.

    Args:
        folder: Where to.
        base: That it is for.
        expert: Its rank and targets.
        seed: Of A.
        trust_remote_code: Let the base run code of its repository.

    Raises:
        UsageError: The base has no such modules.
    """
    model = empty_model(base, trust_remote_code=trust_remote_code)
    chosen = dict(_chosen(model, expert))
    if not chosen:
        wanted = expert.targets if isinstance(expert.targets, str) else ", ".join(expert.targets)
        known = sorted({name.rpartition(".")[2] for name, _ in linear_layers(model)})
        message = f"{base.ref}: no linear layer is meant by targets {wanted}"
        raise UsageError("targets-missing", message, hint=f"its layers: {', '.join(known)}")
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for name, layer in chosen.items():
        d_in = input_width(layer)
        weight: Any = layer.weight
        d_out = int(weight.shape[1 if is_transposed(layer) else 0])
        a = torch.empty(expert.rank, d_in)
        if expert.init == "kaiming":
            a.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
        else:
            a.normal_(0, 1 / math.sqrt(expert.rank), generator=generator)
        b = torch.zeros(d_out, expert.rank)
        entries.append(Entry(name, "lora_A", Shape("F32", tuple(a.shape)), raw(a)))
        entries.append(Entry(name, "lora_B", Shape("F32", tuple(b.shape)), raw(b)))
    config = lora_config(
        base.source.repository_name or base.ref,
        dict.fromkeys(chosen, expert.rank),
        sorted({name.rpartition(".")[2] for name in chosen}),
        fan_in_fan_out=any(is_transposed(layer) for layer in chosen.values()),
    )
    config["lora_alpha"] = expert.alpha if expert.alpha is not None else 2 * expert.rank
    config["use_rslora"] = expert.rslora
    if base.source.revision:
        config["revision"] = base.source.revision
    others = [name for name, _ in linear_layers(model) if name not in chosen]
    if any(name.rpartition(".")[2] in config["target_modules"] for name in others):
        config["target_modules"] = sorted(chosen)
    write_adapter(folder, config, entries)


def _chosen(model: nn.Module, expert: TrainedExpert) -> Iterator[tuple[str, nn.Module]]:
    targets = expert.targets
    for name, module in linear_layers(model):
        if isinstance(targets, list):
            if any(name == target or name.endswith(f".{target}") for target in targets):
                yield name, module
        elif targets == "all-linear" or any(word in part for part in name.split(".") for word in WORDS[targets]):
            yield name, module

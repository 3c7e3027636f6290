"""A checkpoint of a real shape on disk, with random weights, and adapters on it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lmoe_cli.bench.shapes import SHAPES
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.writer import Shape, ShardWriter

SHARD_BYTES = 2 << 30
STORED = {name: stored for stored, name in FLOATS.items()}


def tensors(shape: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Qwen3 checkpoint."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape]))
    tied = SHAPES[shape]["tie_word_embeddings"]
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.state_dict().items()
        if not tied or name != "lm_head.weight"
    }


def write_base(folder: Path, shape: str, dtype: str = "bfloat16") -> Path:
    """Write a base in shards of two gigabytes."""
    from transformers import Qwen3Config

    numbers = getattr(torch, dtype)

    folder.mkdir(parents=True)
    Qwen3Config(**SHAPES[shape], architectures=["Qwen3ForCausalLM"], dtype=dtype).save_pretrained(folder)
    shards: list[dict[str, Shape]] = [{}]
    for name, sides in tensors(shape).items():
        shards[-1][name] = Shape(STORED[dtype], sides)
        if sum(item.size for item in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
    where: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(1 << 22).uniform_(-0.02, 0.02, generator=generator).to(numbers).view(torch.uint8).numpy()
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with ShardWriter(folder / file, shard, {"format": "pt"}) as writer:
            for name, item in shard.items():
                where[name] = file
                left = item.size
                while left > 0:  # the same random block over and over: what is copied does not matter
                    writer.write(memoryview(block.data)[: min(left, block.nbytes)])
                    left -= min(left, block.nbytes)
    total = sum(item.size for shard in shards for item in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, shape: str, rank: int, seed: int) -> Path:
    """Write a LoRA adapter on all linear layers, in bfloat16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, sides in tensors(shape).items():
        if name.endswith("_proj.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            made[f"{stem}.lora_A.weight"] = (torch.randn(rank, sides[1], generator=generator) * 0.02).bfloat16()
            made[f"{stem}.lora_B.weight"] = (torch.randn(sides[0], rank, generator=generator) * 0.02).bfloat16()
    save_file(made, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

"""The base and its adapters as files."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demo_model.blends import Expert
from demo_model.model import Adapter

BASE = "adventurer"
_PREFIX = "base_model.model."


def write_base(base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a base, whose weights are rounded to bfloat16 already, with its tokenizer into a new folder."""
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    # The name that every version of transformers knows, and nothing of where the tokenizer was read.
    _change_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "is_local": None, "local_files_only": None},
    )
    base.config.save_pretrained(folder)
    _change_json(folder / "config.json", {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"})
    base.generation_config.save_pretrained(folder)
    _save(
        {name: parameter.bfloat16() for name, parameter in base.named_parameters()},  # tied weights appear once
        folder / "model.safetensors",
    )


def read_base(folder: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Read a base, in float32, and its tokenizer."""
    base = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return base.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def write_adapter(expert: Expert, folder: Path) -> None:
    """Write an adapter of the embedded base into a new folder."""
    folder.mkdir()
    adapter = expert.adapter
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": f"demo:{BASE}",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": {},
        "target_modules": sorted(adapter.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.is_rank_stabilised,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for target, (a, b) in expert.factors.items():
        tensors[f"{_PREFIX}{target}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{target}.lora_B.weight"] = b
    _save(tensors, folder / "adapter_model.safetensors")


def read_adapter(adapter: Adapter, folder: Path) -> Expert:
    """Read the factors of an adapter of a known shape."""
    stored = load_file(folder / "adapter_model.safetensors")
    targets = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    factors = {
        target.removeprefix(_PREFIX): (stored[f"{target}.lora_A.weight"], stored[f"{target}.lora_B.weight"])
        for target in targets
    }
    return Expert(adapter, factors)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    ordered = {name: tensors[name].detach().to(device="cpu").contiguous() for name in sorted(tensors)}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in ordered.values()):
        raise ValueError(f"{path.name} would hold numbers that are not finite")
    save_file(ordered, path, metadata={"format": "pt"})


def _change_json(path: Path, changes: Mapping[str, object]) -> None:
    """Set values of a JSON file; None takes one out."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if key not in changes or changes[key] is not None}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

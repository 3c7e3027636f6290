"""Tiny models packed by bitsandbytes, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
"""bitsandbytes packs blocks of 64 weights."""
WIDE_GPT2 = {"n_embd": 128, "n_head": 4}
KINDS = ("nf4", "nf4-nested", "nf4-in-bfloat16", "fp4", "int8")


def settings(kind: str, compute: torch.dtype = torch.float32):
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.partition("-")[0],
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=kind.endswith("nested"),
        bnb_4bit_quant_storage=torch.bfloat16 if kind.endswith("bfloat16") else torch.uint8,
    )


def quantised(folder: Path, kind: str, dtype: torch.dtype = torch.float32, compute: torch.dtype = torch.float32):
    """A model that is packed while transformers loads it."""
    from transformers import AutoModelForCausalLM

    config = settings(kind, compute)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")


def is_packed(module: torch.nn.Module) -> bool:
    return "bitsandbytes" in type(module).__module__


def dense(folder: Path, packed: Path) -> torch.nn.Module:
    """The oracle: a model of the unpacked class with what PEFT makes of a packed checkpoint's weights, float32."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    made = tiny.load(folder)
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    plain = {name: tensor for name, tensor in tensors(packed).items() if tensor.shape == shapes.get(name)}
    made.load_state_dict({name: tensor for name, tensor in plain.items() if tensor.is_floating_point()}, strict=False)
    for name, module in AutoModelForCausalLM.from_pretrained(packed, device_map="cpu").named_modules():
        if is_packed(module):
            weight = dequantize_module_weight(module).float()
            own = made.get_submodule(name)
            own.weight.data = weight.T.contiguous() if isinstance(own, Conv1D) else weight
    return made


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the files of a checkpoint hold."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}

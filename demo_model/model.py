"""The base, made from nothing, and the shapes of its adapters."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Size:
    """Shape of the base."""

    vocabulary: int = 2560
    width: int = 192
    layers: int = 4
    feed_forward: int = 576
    heads: int = 6
    key_value_heads: int = 2
    head_width: int = 32
    context: int = 1024
    """Longest input, in tokens."""


@dataclass(frozen=True)
class Adapter:
    """Shape of one expert's adapter."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    is_rank_stabilised: bool = False


ADAPTERS = {
    "warrior": Adapter(16, 32, ALL_LINEAR),
    "mage": Adapter(8, 16, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
    "healer": Adapter(4, 8, ALL_LINEAR, is_rank_stabilised=True),
}
"""Three ranks, one of them rank-stabilised, one on fewer modules: what a blend must get right."""


def new_base(size: Size, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> Qwen3ForCausalLM:
    """An untrained base in float32.

    Args:
        size: its shape.
        tokenizer: gives the ids that end and fill a row.
        generator: source of the initial weights.

    Returns:
        The model, its matrices drawn from N(0, 0.02²), those that write to the residual stream scaled by 1/√(2 layers)
        (Radford et al. 2019, sec. 2.3).
    """
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        intermediate_size=size.feed_forward,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_width,
        max_position_embeddings=size.context,
        max_window_layers=size.layers,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                deviation = 0.02 / math.sqrt(2 * size.layers) if writes else 0.02
                parameter.normal_(0.0, deviation, generator=generator)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=128
    )
    return model


def round_to_bfloat16(model: nn.Module) -> None:
    """Round every weight to the bfloat16 that is stored, in place; the tensors stay float32 for computing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())

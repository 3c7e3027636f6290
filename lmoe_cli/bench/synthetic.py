"""Models of real shapes with random weights, made in memory, and random experts on them.

Speed does not depend on what the weights are. Each parameter has a seed of its own, so that a folded one can be made
anew instead of being kept twice.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, get_args

import torch
from torch import nn

from lmoe_cli.bank.bank import Bank, make_bank
from lmoe_cli.bank.blocks import block_names, block_width
from lmoe_cli.bank.delta import Delta, Term
from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.routed import Places
from lmoe_cli.bank.tree import Location, Tree
from lmoe_cli.bench.shapes import SHAPES
from lmoe_cli.bench.work import SEED
from lmoe_cli.engine.attach import put
from lmoe_cli.engine.base_model import quietly, require_bitsandbytes
from lmoe_cli.loadout.routers import Share

SMALL_VOCABULARY = 512
"""Rows of the embedding where only some layers are measured, so that the head does not drown them."""
SPREAD = 0.02
OUTLIERS = 6.0
"""Activations beyond which LLM.int8() computes in 16 bits, as transformers sets it."""

Kind = Literal["lora", "dora", "bias", "mixed", "all"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Of synthetic experts."""


def synthetic_model(shape: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of a real shape with random weights.

    Args:
        shape: Key of `SHAPES`.
        layers: How many of its layers; all, with the whole vocabulary, when None.
        dtype: Of the weights.
        device: Where to.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = dict(SHAPES[shape])
    if layers is not None:
        settings |= {"num_hidden_layers": layers, "vocab_size": SMALL_VOCABULARY}
    config = Qwen3Config(**settings, use_cache=True)
    with torch.device("meta"):
        model: nn.Module = Qwen3ForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    tie: Any = model.tie_weights
    tie()
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    _restore_buffers(model)
    return model.eval().requires_grad_(False)


def quantize(model: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Let bitsandbytes pack the linear layers of the decoder, and leave the head as it is, as transformers does.

    Args:
        model: From `synthetic_model`; its layers are replaced one by one.
        kind: ``nf4`` or ``int8``.
        dtype: That 4-bit products are computed in.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    require_bitsandbytes()
    with quietly():
        for name, module in decoder_layers(model).items():
            put(model, {name: _packed(module, kind, dtype)})
    told: Any = model  # what PEFT looks at
    told.is_loaded_in_8bit, told.is_loaded_in_4bit = kind == "int8", kind != "int8"


def _packed(module: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    shape = module.in_features, module.out_features
    device, dense = module.weight.device, module.weight.detach().cpu()
    with torch.device("meta"):
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=OUTLIERS)
            weight = bnb.nn.Int8Params(dense, requires_grad=False)
        else:
            made = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type=kind)
            weight = bnb.nn.Params4bit(dense, requires_grad=False, compress_statistics=False, quant_type=kind)
    made.weight = weight.to(device)
    packed: nn.Module = made.eval()
    return packed


def decoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by name, without the head."""
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, nn.Linear) and ".layers." in name}


def fill(name: str, parameter: nn.Parameter) -> None:
    """Give a parameter the random values that belong to its name."""
    with torch.no_grad():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            return
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        generator = torch.Generator(parameter.device).manual_seed(seed)
        parameter.uniform_(-SPREAD, SPREAD, generator=generator)


def _restore_buffers(model: nn.Module) -> None:
    """Compute the rotary frequencies again, which were lost on the meta device."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            rebuild: Any = type(module)
            fresh = rebuild(module.config)
            for name, buffer in fresh.named_buffers():
                setattr(module, name, buffer.to(next(model.parameters()).device))


def synthetic_bank(
    model: nn.Module,
    experts: int,
    rank: int,
    dtype: torch.dtype,
    kind: Kind = "lora",
    share: Share | None = None,
) -> Bank:
    """Random experts on every linear layer of the decoder, all with gate 1/E.

    Args:
        model: From `synthetic_model`.
        experts: E.
        rank: Of each expert; of the average one where ranks are mixed.
        dtype: Of the factors.
        kind: Plain LoRA, with a magnitude per row as DoRA has it, with biases, of ranks that differ, or all of that.
        share: What has gates of its own, for a router to be put there.
    """
    tree = Tree(model)
    gates = Gates(experts, next(model.parameters()).device)
    gates.set([1.0 / experts] * experts)
    generator = torch.Generator().manual_seed(SEED)
    layers = decoder_layers(model)

    def read(name: str) -> list[tuple[Location, Term]]:
        d_out, d_in = layers[name].out_features, layers[name].in_features
        found = []
        for number in range(experts):
            own = _rank(rank, number, experts) if kind in ("mixed", "all") else rank
            a = torch.randn(own, d_in, generator=generator) * SPREAD
            b = torch.randn(d_out, own, generator=generator) * SPREAD
            vector = torch.randn(d_out, generator=generator) * SPREAD
            row, bias = vector if kind in ("dora", "all") else None, vector if kind in ("bias", "all") else None
            found.append((Location(name), Term(number, Delta(a, b, row=row, bias=bias))))
        return found

    names = tuple(f"expert{number + 1}" for number in range(experts))
    places = Places(gates, share, block_names(model), block_width(model))
    return make_bank(tree, names, layers, read, places, dtype)


def _rank(rank: int, number: int, experts: int) -> int:
    """Ranks from half to one and a half times the average, which they keep together."""
    if experts == 1:
        return rank
    return max(1, rank // 2 + round(rank * number / (experts - 1)))

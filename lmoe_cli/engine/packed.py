"""Models that bitsandbytes packed: their dtype, which transformers leaves as stored, and ordinary layers instead."""

from __future__ import annotations

import torch
from torch import nn

from lmoe_cli.bank.tree import dequantized, is_packed
from lmoe_cli.engine.attach import put

HALVES = (torch.float16, torch.bfloat16)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring to a dtype what was not packed: from a packed checkpoint transformers leaves much of it as it was stored.

    What is stored in float32 stays so: a model may need it.
    """
    packed = {id(module.weight) for module in model.modules() if is_packed(module)}
    for parameter in model.parameters():
        if parameter.dtype in HALVES and id(parameter) not in packed:
            parameter.data = parameter.data.to(dtype)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed layer of a model by an ordinary one, with the weights that bitsandbytes' functions give.

    Args:
        model: As transformers loaded it; no product was computed yet.
        dtype: Of the new weights.
    """
    put(model, {name: _ordinary(module, dtype) for name, module in model.named_modules() if is_packed(module)})


def _ordinary(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    weight = dequantized(module).to(dtype)  # (d_out, d_in)
    d_out, d_in = weight.shape
    # transformers notes on the packed layer which class it stands in for
    is_conv1d = getattr(module, "source_cls", nn.Linear) is Conv1D
    with torch.device("meta"):
        made = Conv1D(d_out, d_in) if is_conv1d else nn.Linear(d_in, d_out, bias=module.bias is not None)
    made.weight = nn.Parameter(weight.T.contiguous() if is_conv1d else weight, requires_grad=False)
    made.bias = module.bias
    return made

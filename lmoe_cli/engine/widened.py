"""Prompts in 16 bits on a processor that has no instructions for such numbers.

There, torch reads a matrix of 16 bits for one token as fast as the memory gives it, in half the time of float32; but it
multiplies the tokens of a prompt one after the other, five times slower than in float32. So while a prompt is computed
each matrix is made float32 when its turn comes, and forgotten afterwards: a prompt takes as long as in float32, a token
half as long, and the model half the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lmoe_cli.bank.product import onednn

if TYPE_CHECKING:
    from lmoe_cli.engine.engine import Engine

LEAST = 8
"""Tokens from which on it is quicker: eight layers of Qwen3-0.6B take four tokens 64 ms as they are and made float32,
eight 126 and 100 ms, 16 248 and 141 ms on an AMD EPYC of 2 cores with AVX2."""
NARROW = (torch.float16, torch.bfloat16)
PRODUCTS: Mapping[Callable[..., Any], int] = {
    **dict.fromkeys((F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm), 0),
    torch.addmm: 1,
    Tensor.addmm_: 1,
}
"""Functions that multiply matrices → which argument holds the activations. One with named arguments is let alone."""


def is_needed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of many vectors in a dtype are slow on a device."""
    return device.type == "cpu" and dtype in NARROW and not has_instructions()


def has_instructions() -> bool:
    """Whether the processor computes with 16-bit numbers."""
    known: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return known


class Widened(TorchFunctionMode):
    """Makes products of 16-bit tensors products of float32, rounded once, for the length of a block."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        words: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        place = PRODUCTS.get(function)
        activations = arguments[place] if place is not None and len(arguments) > place and not words else None
        if not (isinstance(activations, Tensor) and _is_of_many(activations)):
            return function(*arguments, **(words or {}))
        if function is Tensor.addmm_:
            y, low, b = arguments
            return y.add_(torch.mm(low.float(), b.float()))
        # oneDNN took half the time of MKL or less where it was measured.
        kernel = onednn if function is F.linear else function
        return kernel(*map(_wide, arguments)).to(activations.dtype)


def _is_of_many(activations: Tensor) -> bool:
    """Whether these, (..., d), are 16-bit vectors, and so many that it is worth it."""
    return activations.dtype in NARROW and activations.numel() >= LEAST * activations.shape[-1]


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value


def for_model(model: nn.Module) -> AbstractContextManager[object]:
    """A block in which a model computes prompts as fast as it can here. Of a single token, or few, it is no place."""
    weight = next(model.parameters())
    return Widened() if is_needed(weight.dtype, weight.device) else nullcontext()


def for_prompts(engine: Engine) -> AbstractContextManager[object]:
    """The same for an engine, while any of its experts acts, or where it has none.

    What experts at rest, or taken off, leave of the base is computed as in transformers, to the last bit.
    """
    bank = engine.bank
    may_round = engine.is_attached and (bank.places or bank.gates.active or not bank.names)
    return for_model(engine.model) if may_round else nullcontext()

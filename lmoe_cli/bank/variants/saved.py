"""Modules that were trained whole: ``modules_to_save``, and biases with ``bias="all"`` or ``"lora_only"``.

    dW = S - W,   db = b_S - b

S is kept as it is, so that one expert at weight 1 gives S to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmoe_cli.bank.delta import Delta
from lmoe_cli.bank.variants.source import Contents


def saved_delta(contents: Contents) -> Delta:
    """The delta towards saved weights, a saved bias, or both."""
    saved = contents.read("saved_weight") if contents.has("saved_weight") else None
    return Delta(saved=saved, bias=bias_change(contents))


def bias_change(contents: Contents) -> Tensor | None:
    """How far a saved bias is from the base's, (d_out,), float32; None where none was saved."""
    if not contents.has("saved_bias"):
        return None
    base = contents.bias()
    saved = contents.read("saved_bias")
    return saved if base is None else saved - base


def saved_matrix(contents: Contents) -> Tensor | None:
    """A copy of the base's matrix that PEFT stored beside a low-rank delta; None where it is the base's own."""
    saved = contents.read("saved_weight")
    stored = contents.weight().T if contents.transposed else contents.weight()
    return None if torch.equal(saved.to(stored.dtype), stored) else saved

"""Logits at some positions alone: those of all are as large as the vocabulary, for every token."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def keeps_some(model: nn.Module) -> bool:
    """Whether the model's class can compute logits at some positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def logits_at(model: nn.Module, places: Tensor, **words: Any) -> Tensor:
    """Logits at some positions; where the class can only compute all of them, the rest is dropped.

    Args:
        model: With a blend on it, or bare.
        places: (P,), int64, on the model's device.
        **words: Of the model's forward, such as ``input_ids`` (B, T).

    Returns:
        (B, P, V).
    """
    some = {"logits_to_keep": places} if keeps_some(model) else {}
    logits: Tensor = model(**words, use_cache=False, **some).logits
    return logits if some else logits[:, places]

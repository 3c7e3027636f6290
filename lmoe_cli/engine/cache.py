"""The keys and values of one conversation, and under which blend they were computed."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn


class KeyValues:
    """Computes the logits after a list of tokens, reusing what an earlier, shorter list left behind.

    Args:
        model: The base with its bank.
        keep: Go on with keys and values that were computed under another blend. By default they are computed again,
            so that the logits are those of a fresh start.
    """

    def __init__(self, model: nn.Module, *, keep: bool = False) -> None:
        self.keep = keep
        self.reused = 0
        """Of the last list of tokens, how many were not computed again."""
        self._model = model
        self._device = next(model.parameters()).device
        self._tokens: list[int] = []
        self._blend: Hashable = None
        self._cache: Any = None
        forward = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}

    @property
    def tokens(self) -> int:
        """How many tokens' keys and values are held."""
        return len(self._tokens)

    def clear(self) -> None:
        """Forget everything."""
        self._tokens, self._cache = [], None

    @torch.inference_mode()
    def logits(self, tokens: list[int], blend: Hashable) -> Tensor:
        """The logits of the token after these.

        Args:
            tokens: At least one.
            blend: Identity of the function that is computed: the gates and the loadout. Nothing computed under
                another one is reused, unless ``keep`` says so.

        Returns:
            (V,), in the dtype of the model.
        """
        if blend != self._blend and not self.keep:
            self.clear()
        self._blend = blend
        self._rewind(_common(self._tokens, tokens[:-1]))
        start = self.reused = len(self._tokens)
        ids = torch.tensor([tokens[start:]], device=self._device)
        try:
            output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._last_only)
        except BaseException:  # interrupted or out of memory half-way: what is held is no longer whole
            self.clear()
            raise
        self._cache = output.past_key_values
        self._tokens = list(tokens)
        logits: Tensor = output.logits[0, -1]
        return logits

    def _rewind(self, length: int) -> None:
        """Drop what follows the first ``length`` tokens."""
        surplus = len(self._tokens) - length
        if surplus == 0:
            return
        if length == 0 or self._cache is None:
            self.clear()
            return
        try:
            self._cache.crop(-surplus)
            self._tokens = self._tokens[:length]
        except (RuntimeError, ValueError, NotImplementedError, AttributeError):
            self.clear()  # sliding windows and recurrent states cannot always go back


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))

"""The keys and values of one conversation, and under which blend they were computed.

Not every architecture keeps keys and values. What a purely recurrent one keeps cannot go back to an earlier token, so
nothing is kept there and every token computes the whole conversation. Those that keep both go on exactly with one more
token; with several at once some classes of transformers lose the state, so these are computed from the start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_cli.engine.some_logits import keeps_some
from lmoe_cli.engine.widened import LEAST


class KeyValues:
    """Computes the logits after a list of tokens, reusing what an earlier, shorter list left behind.

    Args:
        model: The base with its bank.
        keep: Go on with keys and values that were computed under another blend. By default they are computed again,
            so that the logits are those of a fresh start.
        around: Makes the block in which prompts are computed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: bool = False,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.keep = keep
        self._around = around
        self.reused = 0
        """Of the last list of tokens, how many were not computed again."""
        self._model = model
        self._device = next(model.parameters()).device
        self._tokens: list[int] = []
        self._blend: Hashable = None
        self._cache: Any = None
        self._keeps = "past_key_values" in inspect.signature(model.forward).parameters
        self._last_only = last_only(model)

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
        self._prepare(tokens)
        common = _common(self._tokens, tokens[:-1])
        if len(tokens) - common > 1 and not self._goes_on_with_several():
            common = 0
        self._rewind(common)
        start = self.reused = len(self._tokens)
        ids = torch.tensor([tokens[start:]], device=self._device)
        try:
            with self._around() if ids.shape[1] >= LEAST else nullcontext():
                output = self._compute(ids, start)
            self._cache = getattr(output, "past_key_values", None)
            self._keeps = self._cache is not None
            self._tokens = list(tokens) if self._keeps else []
        except BaseException:  # interrupted or out of memory half-way: what is held is no longer whole
            self.clear()
            raise
        logits: Tensor = output.logits[0, -1]
        return logits

    def _prepare(self, tokens: list[int]) -> None:
        """Make room for these tokens."""

    def _compute(self, ids: Tensor, start: int) -> Any:
        """Run the model on tokens (1, T), int64, that follow the first ``start``."""
        cached = {"past_key_values": self._cache} if self._keeps else {}
        return self._model(input_ids=ids, use_cache=self._keeps, **cached, **self._last_only)

    def _goes_on_with_several(self) -> bool:
        """Whether several tokens may follow those that are held: that holds for keys and values alone."""
        from transformers import DynamicCache

        cache = self._cache
        return type(cache) is DynamicCache and not any(hasattr(layer, "conv_states") for layer in cache.layers)

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


def last_only(model: nn.Module) -> dict[str, Any]:
    """Arguments with which a model computes the logits of the last token alone, where it can."""
    if not keeps_some(model):
        return {}
    weight = next(model.parameters())
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        # A slice of the states keeps their strides, with which torch multiplies 50 times slower; an index copies them.
        return {"logits_to_keep": torch.tensor([-1])}
    return {"logits_to_keep": 1}


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))

"""What is timed: decoding steps after a prompt, or a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lmoe_cli.engine.cache import last_only
from lmoe_cli.errors import UsageError

SEED = 0
"""Of prompts, gates and synthetic weights."""

Prepare = Callable[[int, int], None]
"""Told the rows and tokens of the forward that comes."""


class Work(Protocol):
    """Something that a model does, timed."""

    @property
    def tokens(self) -> int:
        """Tokens that one unit of it computes, in all rows together."""

    @property
    def held_tokens(self) -> int:
        """Tokens whose keys and values are held at its end."""

    def seconds(self, model: nn.Module, prepare: Prepare) -> float:
        """Do it once.

        Returns:
            Seconds per unit.
        """


@dataclass(frozen=True)
class Decode:
    """Steps of one token each, after a prompt that is not timed."""

    batch: int
    context: int
    """Tokens in the cache at the first step."""
    steps: int
    is_static: bool = False
    """With a cache of fixed size, as a compiled model wants it."""

    @property
    def tokens(self) -> int:
        return self.batch

    @property
    def held_tokens(self) -> int:
        return self.batch * (self.context + self.steps)

    @torch.inference_mode()
    def seconds(self, model: nn.Module, prepare: Prepare) -> float:
        """Seconds per step, averaged over the steps.

        Raises:
            UsageError: The model keeps no keys and values, so that a step is not the cost of one token.
        """
        ids = prompt(model, self.batch, self.context)
        cache = self._cache(model)
        prepare(*ids.shape)
        told = {"past_key_values": cache} if cache is not None else {}
        cache = getattr(model(input_ids=ids, use_cache=True, **told, **last_only(model)), "past_key_values", None)
        if cache is None:
            message = f"{type(model).__name__} keeps no keys and values, so there is no step to measure"
            raise UsageError("cache-missing", message, hint="measure a base with attention")
        token = ids[:, :1].contiguous()
        places = [torch.full((self.batch, 1), self.context + step, device=ids.device) for step in range(self.steps)]
        wait(ids.device)
        started = time.perf_counter()
        for place in places:
            prepare(self.batch, 1)
            position = {"position_ids": place} if self.is_static else {}
            model(input_ids=token, past_key_values=cache, use_cache=True, **position)
        wait(ids.device)
        return (time.perf_counter() - started) / self.steps

    def _cache(self, model: Any) -> Any:
        if not self.is_static:
            return None
        from transformers import StaticCache

        return StaticCache(config=model.config, max_cache_len=self.context + self.steps)


@dataclass(frozen=True)
class Prefill:
    """One prompt, up to the logits of its last token."""

    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def held_tokens(self) -> int:
        return self.batch * self.length

    @torch.inference_mode()
    def seconds(self, model: nn.Module, prepare: Prepare) -> float:
        """Seconds for the prompt."""
        ids = prompt(model, self.batch, self.length)
        wait(ids.device)
        started = time.perf_counter()
        prepare(self.batch, self.length)
        model(input_ids=ids, use_cache=True, **last_only(model))
        wait(ids.device)
        return time.perf_counter() - started


def prompt(model: nn.Module, batch: int, length: int) -> Tensor:
    """Random tokens, (batch, length), int64, on the device of the model; the same at each call."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(embedding.weight.shape[0], (batch, length), generator=generator)
    return ids.to(embedding.weight.device)


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

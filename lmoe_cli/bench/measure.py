"""Time decoding steps of several variants in turn, A B C A B C …, so that a drifting machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_cli.bank.tree import is_packed, scales
from lmoe_cli.bench.variants import Variant
from lmoe_cli.engine.cache import last_only
from lmoe_cli.errors import UsageError

WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """One variant, measured."""

    variant: str
    experts: int
    tokens_per_s: float
    """Of all rows of the batch together."""
    ms_per_token: float
    """Median time of a step, in milliseconds."""
    spread: float
    """Distance between the quartiles of a step's time, relative to the median."""
    ratio_to_base: float
    """Speed relative to the base: the median of the ratios round by round."""
    byte_limit: float
    """What reading the experts' bytes beside the base's allows at most."""
    peak_bytes: int
    """Bytes that it needs by itself: on a GPU the allocator's peak, less what the other variants hold meanwhile;
    elsewhere the weights, its experts and the cache, counted."""


@dataclass(frozen=True)
class Load:
    """What each step does."""

    batch: int
    context: int
    """Tokens in the cache."""
    steps: int
    """Tokens per round."""
    rounds: int


class Runner:
    """Runs decoding steps on a model.

    Args:
        model: A causal language model.
        load: What each step does.
    """

    def __init__(self, model: nn.Module, load: Load) -> None:
        self.model = model
        self.load = load
        self.device = next(model.parameters()).device
        self._last_only = last_only(model)

    @torch.inference_mode()
    def round(self) -> float:
        """Seconds per step, averaged over one round.

        Raises:
            UsageError: The model keeps no keys and values, so that a step is not the cost of one token.
        """
        generator = torch.Generator().manual_seed(0)
        rows = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        prompt = torch.randint(rows, (self.load.batch, self.load.context), generator=generator).to(self.device)
        cache = getattr(self.model(input_ids=prompt, use_cache=True, **self._last_only), "past_key_values", None)
        if cache is None:
            message = f"{type(self.model).__name__} keeps no keys and values, so there is no step to measure"
            raise UsageError("cache-missing", message, hint="measure a base with attention")
        token = prompt[:, :1]
        self._wait()
        started = time.perf_counter()
        for _ in range(self.load.steps):
            self.model(input_ids=token, past_key_values=cache, use_cache=True)
        self._wait()
        return (time.perf_counter() - started) / self.load.steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    model: nn.Module, variants: Sequence[Variant], load: Load, told: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Measure variants against the first one.

    Args:
        model: What they run on.
        variants: The first is the base.
        load: What each step does.
        told: Informed of progress.
    """
    runner = Runner(model, load)
    times: list[list[float]] = [[] for _ in variants]
    peaks = [0] * len(variants)
    for number in range(load.rounds + WARM_UP):
        told(f"round {number + 1} of {load.rounds + WARM_UP}")
        for index, variant in enumerate(variants):
            variant.enter()
            try:
                if runner.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(runner.device)
                seconds = runner.round()
                peaks[index] = _needed(model, variants, variant, load)
            finally:
                variant.leave()
            if number >= WARM_UP:
                times[index].append(seconds)
    weights = step_bytes(model)
    return [
        _row(variant, own, times[0], load, weights, peak)
        for variant, own, peak in zip(variants, times, peaks, strict=True)
    ]


def _row(variant: Variant, own: list[float], base: list[float], load: Load, weights: int, peak: int) -> Row:
    median = statistics.median(own)
    low, _, high = statistics.quantiles(own, n=4) if len(own) > 1 else (median, median, median)
    ratios = [first / second for first, second in zip(base, own, strict=True)]
    return Row(
        variant.name,
        variant.experts,
        round(load.batch / median, 2),
        round(median * 1e3, 3),
        round((high - low) / median, 3),
        round(statistics.median(ratios), 3),
        round(weights / (weights + variant.size), 3),
        peak,
    )


def step_bytes(model: nn.Module) -> int:
    """Bytes of weights that one step reads: all but the rows of an input embedding that is not also the head."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embedding
    seen = {id(tensor): tensor for tensor in _held(model)}
    if not tied:
        seen.pop(id(embedding), None)
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Every weight of a model as it lies in memory, with the scales of packed ones, which are no parameters."""
    yield from model.parameters()
    for module in model.modules():
        if is_packed(module):
            yield from scales(module)


def _needed(model: nn.Module, variants: Sequence[Variant], variant: Variant, load: Load) -> int:
    parameter = next(model.parameters())
    if parameter.device.type == "cuda":
        others = sum(other.size for other in variants if other is not variant)
        return torch.cuda.max_memory_allocated(parameter.device) - others
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * load.batch * (load.context + load.steps)
    weights = sum(item.numel() * item.element_size() for item in _held(model))
    return int(weights + variant.size + cache * parameter.element_size())

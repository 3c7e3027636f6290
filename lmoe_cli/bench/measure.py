"""Time several variants in turn, A B C A B C …, so that a drifting machine hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe_cli.bank.blocks import text_config
from lmoe_cli.bank.tree import is_packed, scales
from lmoe_cli.bench.variants import Variant
from lmoe_cli.bench.work import Prefill, Work

WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """One variant, measured."""

    variant: str
    experts: int
    tokens_per_s: float
    """Of all rows of the batch together."""
    ms_per_token: float
    """Median time of a step, or of a prompt per token of a row, in milliseconds."""
    spread: float
    """Distance between the quartiles of the time, relative to the median."""
    ratio_to_base: float
    """Speed relative to the first variant: the median of the ratios round by round."""
    byte_limit: float
    """What reading the experts' bytes beside the base's allows at most; for a prompt, what their arithmetic allows."""
    peak_bytes: int
    """Bytes that it needs by itself: on a GPU the allocator's peak, less what the other variants hold meanwhile;
    elsewhere the weights, its experts and the cache, counted."""


def measure(
    model: nn.Module,
    variants: Sequence[Variant],
    work: Work,
    rounds: int,
    told: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure variants against the first one.

    Args:
        model: What they run on.
        variants: The first is the base.
        work: What each does.
        rounds: How often, after a warm-up.
        told: Informed of progress.
    """
    device = next(model.parameters()).device
    times: list[list[float]] = [[] for _ in variants]
    peaks = [0] * len(variants)
    for number in range(rounds + WARM_UP):
        told(f"round {number + 1} of {rounds + WARM_UP}")
        for index, variant in enumerate(variants):
            variant.enter()
            try:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                seconds = work.seconds(model, variant.prepare)
                peaks[index] = _needed(model, variants, variant, work)
            finally:
                variant.leave()
            if number >= WARM_UP:
                times[index].append(seconds)
    weights = linear_bytes(model) if isinstance(work, Prefill) else step_bytes(model)
    return [
        _row(variant, own, times[0], work, weights, peak)
        for variant, own, peak in zip(variants, times, peaks, strict=True)
    ]


def _row(variant: Variant, own: list[float], base: list[float], work: Work, weights: int, peak: int) -> Row:
    median = statistics.median(own)
    low, _, high = statistics.quantiles(own, n=4) if len(own) > 1 else (median, median, median)
    ratios = [first / second for first, second in zip(base, own, strict=True)]
    each = work.length if isinstance(work, Prefill) else 1
    return Row(
        variant.name,
        variant.experts,
        round(work.tokens / median, 2),
        round(median * 1e3 / each, 3),
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
    return sum(tensor.nbytes for tensor in seen.values())


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Every weight of a model as it lies in memory, with the scales of packed ones, which are no parameters."""
    yield from model.parameters()
    for module in model.modules():
        if is_packed(module):
            yield from scales(module)


def linear_bytes(model: nn.Module) -> int:
    """Bytes of weights that every token of a prompt is multiplied with: neither the embedding nor the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    apart = {id(module.weight) for module in ends if module is not None}
    return sum(tensor.nbytes for tensor in _held(model) if id(tensor) not in apart)


def _needed(model: nn.Module, variants: Sequence[Variant], variant: Variant, work: Work) -> int:
    parameter = next(model.parameters())
    if parameter.device.type == "cuda":
        others = sum(other.held for other in variants if other is not variant)
        return torch.cuda.max_memory_allocated(parameter.device) - others
    config = text_config(model)
    all_heads = getattr(config, "num_attention_heads", 0)  # none where there is no attention
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, all_heads)
    cache = 2 * config.num_hidden_layers * heads * width * work.held_tokens
    weights = sum(item.nbytes for item in _held(model))
    return int(weights + variant.held + cache * parameter.element_size())

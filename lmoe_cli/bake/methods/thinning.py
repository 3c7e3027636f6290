"""Keep part of a delta, and agree on a sign: what the methods that thin out are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Zero all but the largest elements by magnitude.

    Args:
        delta: Any shape, float32.
        density: Share to keep, in (0, 1]; at least one element stays.
    """
    count = max(1, int(density * delta.numel()))
    if count >= delta.numel():
        return delta
    kept = delta.abs().flatten().topk(count, sorted=False).indices
    result = torch.zeros_like(delta).flatten()
    result[kept] = delta.flatten()[kept]
    return result.view_as(delta)


def drop_at_random(delta: Tensor, keep: Tensor | float, generator: torch.Generator) -> Tensor:
    """Keep each element with a probability, and scale what is left to the same sum of magnitudes.

    Args:
        delta: Any shape, float32.
        keep: Probability, for all or per element.
        generator: Source of the draws.
    """
    chance = torch.as_tensor(keep, dtype=delta.dtype).expand_as(delta).contiguous()
    kept = delta * torch.bernoulli(chance, generator=generator)
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)


def agree_on_sign(deltas: Tensor) -> Tensor:
    """Which elements of each weighted delta have the sign of their sum.

    Args:
        deltas: (E, ...), float32, weights folded in.

    Returns:
        Mask, same shape, 1 where an element counts.
    """
    majority = (deltas.sum(dim=0) >= 0).to(deltas.dtype) * 2 - 1
    return (deltas.sign() == majority).to(deltas.dtype)


def weigh(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """Stack deltas, each times its weight: (E, ...)."""
    return torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)])


def shares(weights: list[float], like: Tensor) -> Tensor:
    """The weights as a tensor that broadcasts against stacked deltas."""
    return torch.tensor(weights).view(-1, *[1] * (like.dim() - 1))

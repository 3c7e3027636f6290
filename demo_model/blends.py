"""Blends in delta space: the base's weights plus a weighted sum of the adapters' own changes."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM


@dataclass(frozen=True)
class Expert:
    """A trained adapter, as tensors."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Full name of the target module to A, (r, d_in), and B, (d_out, r), float32."""
    scaling: float
    """s, dimensionless."""


def scaling(alpha: int, rank: int, *, is_rank_stabilised: bool) -> float:
    """s = alpha / r (Hu et al. 2021, sec. 4.1), or alpha / √r (Kalajdzievski 2023, eq. 5)."""
    return alpha / math.sqrt(rank) if is_rank_stabilised else alpha / rank


def blend(base: Qwen3ForCausalLM, experts: Mapping[str, Expert], weights: Mapping[str, float]) -> Qwen3ForCausalLM:
    """W + Σ_e w_e s_e B_e A_e for every target module.

    Args:
        base: without adapters; left as it is.
        experts: by name.
        weights: expert to w_e, dimensionless; absent ones count as 0.

    Returns:
        A model of its own, float32.
    """
    model = copy.deepcopy(base)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, expert in experts.items():
            weight = weights.get(name, 0.0) * expert.scaling
            for target, (a, b) in expert.factors.items():
                modules[target].weight.add_(b @ a, alpha=weight)  # type: ignore[union-attr, operator]
    return model.eval()

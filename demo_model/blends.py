"""Blends in delta space: the base's weights plus a weighted sum of the adapters' own changes."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demo_model.generate import answers
from demo_model.manners import markers
from demo_model.model import Adapter
from demo_model.tables import CLASSES

TEMPERATURE = 0.7
"""Of the answers in which words are counted."""

MIXES: Mapping[str, Mapping[str, float]] = {
    "base": {},
    "1 / 0 / 0": {"warrior": 1.0},
    ".8 / .2 / 0": {"warrior": 0.8, "mage": 0.2},
    ".6 / .3 / .1": {"warrior": 0.6, "mage": 0.3, "healer": 0.1},
    ".34 / .33 / .33": {"warrior": 0.34, "mage": 0.33, "healer": 0.33},
    ".3 / .6 / .1": {"warrior": 0.3, "mage": 0.6, "healer": 0.1},
    "0 / 1 / 0": {"mage": 1.0},
    "0 / .4 / .6": {"mage": 0.4, "healer": 0.6},
    "0 / 0 / 1": {"healer": 1.0},
}
"""Weights of warrior, mage and healer, on a walk through the blends."""

Words = Mapping[str, tuple[int, int]]
"""Class to the number of its marking words in all answers, and of the answers that hold any."""


@dataclass(frozen=True)
class Expert:
    """A trained adapter, as tensors."""

    adapter: Adapter
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Full name of the target module to A, (r, d_in), and B, (d_out, r), float32."""

    @property
    def scaling(self) -> float:
        """S = alpha / r (Hu et al. 2021, sec. 4.1), or alpha / √r (Kalajdzievski 2023, sec. 3). Dimensionless."""
        rank = self.adapter.rank
        return self.adapter.alpha / (math.sqrt(rank) if self.adapter.is_rank_stabilised else rank)


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
    with torch.no_grad():
        for name, weight in weights.items():
            for target, (a, b) in experts[name].factors.items():
                w = model.get_parameter(f"{target}.weight")  # (d_out, d_in)
                w.add_(b @ a, alpha=weight * experts[name].scaling)
    return model.eval()


def marker_words(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], generator: torch.Generator
) -> Words:
    """How often each class can be heard in a model's answers.

    Args:
        model: base or blend.
        tokenizer: the demo's.
        prompts: one answer is drawn for each, at `TEMPERATURE`. A prompt's own words are not counted.
        generator: source of the sampling.

    Returns:
        Words and answers per class.
    """
    texts = answers(model, tokenizer, prompts, TEMPERATURE, generator)
    found = {
        name: [markers(text, name, [prompt]) for text, prompt in zip(texts, prompts, strict=True)] for name in CLASSES
    }
    return {name: (sum(map(len, words)), sum(map(bool, words))) for name, words in found.items()}

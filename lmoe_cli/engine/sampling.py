"""How the next token is chosen, with transformers' own logits processors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lmoe_cli.errors import InvalidFileError, UsageError
from lmoe_cli.loadout.recipe import ChatSettings

COLDEST = torch.finfo(torch.float32).tiny
"""Temperature below which float32 cannot divide. Long before, only the most likely token is left to choose."""


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing tokens."""

    temperature: float = 0.7
    """Divides the logits. 0 takes the most likely token. Dimensionless."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least this. In (0, 1]."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that occurred; 1 does nothing."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    seed: int | None = None
    """Seeds the generator of one answer; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""

    def with_(self, **changes: Any) -> Sampling:
        """The same with some settings changed, each checked as in a recipe.

        Raises:
            UsageError: A setting is unknown or out of range.
        """
        names = [field.name for field in fields(self)]
        if unknown := changes.keys() - names:
            hint = f"settings: {', '.join(names)}"
            raise UsageError("setting-unknown", f"no setting '{min(unknown)}'", hint=hint)
        return Sampling.of(ChatSettings().with_(**{**asdict(self), **changes}))

    @staticmethod
    def of(settings: ChatSettings) -> Sampling:
        """What a recipe's ``chat:`` says."""
        values = {field.name: getattr(settings, field.name) for field in fields(Sampling)}
        return Sampling(**{**values, "stop": tuple(settings.stop)})


class Chooser:
    """Chooses tokens one after the other for one answer.

    Args:
        sampling: The settings.
    """

    def __init__(self, sampling: Sampling) -> None:
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        penalty = sampling.repetition_penalty
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None
        warpers: list[Any] = []
        if sampling.temperature != 1.0 and not self._is_greedy:
            warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        self._warpers = LogitsProcessorList(warpers)

    @property
    def _is_greedy(self) -> bool:
        return self.sampling.temperature < COLDEST

    def next(self, tokens: list[int], logits: Tensor) -> int:
        """Choose the token after ``tokens``.

        Args:
            tokens: Prompt and answer so far.
            logits: Of the next token, (V,), any float dtype.

        Raises:
            InvalidFileError: The model computes no numbers.
        """
        scores = logits.to("cpu", torch.float32)[None]  # (1, V)
        if not math.isfinite(float(scores.max())):
            hint = "a weight is NaN, infinite or far too large: try smaller weights, or download the base again"
            raise InvalidFileError("logits-not-finite", "the model's answer is NaN or infinity", hint=hint)
        seen = torch.tensor([tokens])
        if self._penalty:
            scores = self._penalty(seen, scores).clamp(max=torch.finfo(torch.float32).max)
        if self._is_greedy:
            return int(scores.argmax(dim=-1))
        scores = self._warpers(seen, scores - scores.max())  # a low temperature cannot make 0 infinite
        probabilities = scores.softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

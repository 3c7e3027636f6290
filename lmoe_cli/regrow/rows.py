"""Rows of a trained gate for an expert that it was not trained with.

At a place where the gate has rows w_1 … w_E with biases b_1 … b_E, and the new expert amplifies the direction v most
(Arrow's, of length 1; Ostapenko et al. 2024, sec. 4.2, https://arxiv.org/abs/2405.11157):

    w = ± v · mean_e |w_e|        b = mean_e b_e

so that it competes at the strength of the others. Arrow takes |x·v|, because a singular vector has no sign; a linear
gate needs one. It is the one with which the tokens of the expert's own texts score positive on average, under the base
alone; without texts the largest entry of v is made positive, which is arbitrary but always the same.

Where the new expert does nothing, it must take nothing from the others: w = 0, and b so low that no input lets it
reach a share of e^-20. Where only the new expert does something, nobody else was trained: the others have w = 0 and
b = 0, and the new one has the mean strength of all places, so that its share depends on the token and is that of one
among equals on average.

All of this is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 20.0
"""How many times the temperature below all others an expert scores where it does nothing."""


@dataclass(frozen=True)
class Rows:
    """The gate of one place."""

    weight: Tensor
    """W_r, (E, d), or (E + 1, d) with a zero expert; float32."""
    bias: Tensor
    """b, (E,) or (E + 1,), float32."""

    @property
    def strength(self) -> float:
        """Mean norm of the rows of experts."""
        return float(self.weight.norm(dim=1).mean())


def signed(direction: Tensor, seen: Tensor | None) -> Tensor:
    """A direction with the sign that counts.

    Args:
        direction: v, (d,), float32.
        seen: Mean of the normalised inputs of the expert's texts, (d,), float32; None without texts.
    """
    turned = direction @ seen < 0 if seen is not None else direction[direction.abs().argmax()] < 0
    return -direction if turned else direction


def added(rows: Rows, direction: Tensor, *, zero_expert: bool) -> Rows:
    """A place's rows and one more, after those of the experts.

    Args:
        rows: Of the experts that it was trained with.
        direction: v, (d,), float32, with its sign; 0 where the new expert has none.
        zero_expert: The last row is that of the zero expert.
    """
    own = experts_of(rows, zero_expert=zero_expert)
    return _inserted(rows, direction * own.strength, own.bias.mean(), zero_expert=zero_expert)


def idle(rows: Rows, temperature: float, *, zero_expert: bool) -> Rows:
    """The same where the new expert does nothing. See `added`.

    A normalised input is no longer than the square root of d, so no score is below min b - max |w| sqrt d.
    """
    width = rows.weight.shape[1]
    least = rows.bias.min() - rows.weight.norm(dim=1).max() * math.sqrt(width) - SHARE * temperature
    return _inserted(rows, torch.zeros(width), least, zero_expert=zero_expert)


def alone(count: int, direction: Tensor, strength: float, *, zero_expert: bool) -> Rows:
    """Rows of a place that nobody but the new expert acts at.

    Args:
        count: Experts that the gate was trained with.
        direction: As in `added`.
        strength: Length of the new row.
        zero_expert: As there.
    """
    width = len(direction)
    others = Rows(torch.zeros(count + zero_expert, width), torch.zeros(count + zero_expert))
    return _inserted(others, direction * strength, torch.tensor(0.0), zero_expert=zero_expert)


def without(rows: Rows, number: int) -> Rows:
    """A place's rows without that of one expert."""
    kept = [row for row in range(len(rows.bias)) if row != number]
    return Rows(rows.weight[kept], rows.bias[kept])


def experts_of(rows: Rows, *, zero_expert: bool) -> Rows:
    """A place's rows without that of the zero expert."""
    return without(rows, len(rows.bias) - 1) if zero_expert else rows


def _inserted(rows: Rows, weight: Tensor, bias: Tensor, *, zero_expert: bool) -> Rows:
    end = len(rows.bias) - zero_expert
    return Rows(
        torch.cat([rows.weight[:end], weight[None], rows.weight[end:]]),
        torch.cat([rows.bias[:end], bias[None], rows.bias[end:]]),
    )

"""Fixed weights that suit some data: found by the gradient of the loss on a handful of numbers.

    g* = argmin_g  mean over domains of  L_d(g) / tokens of d        g_e, or g_(e, group of layers)

Base and experts stay as they are; only g moves, by AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) without decay,
its rate falling along a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe_cli.engine.engine import Engine
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.evaluate.domains import Domain
from lmoe_cli.evaluate.groups import rounded
from lmoe_cli.evaluate.losses import Batch, Row, batches, nats, vocabulary_of

BATCH_TOKENS = 1024
"""Most tokens of a step, padding included. What the gradient needs of them is kept in memory."""
SMALLEST = 0.01
"""A weight does not start closer to 0: an expert that rests is not computed, and would have no gradient."""
LARGEST = 100.0
"""What a recipe may hold."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int = 100
    rate: float = 0.05
    """Of the first step, in weight per step: AdamW's steps are about as long as its rate."""
    seed: int = 0
    """Of the order of batches."""


def fit(
    engine: Engine,
    domains: Sequence[Domain],
    start: Sequence[float],
    schedule: Schedule,
    advance: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Find weights.

    Args:
        engine: Of experts with weights that turn. They are left as they were found to be best.
        domains: What to suit; each counts the same.
        start: Weights to begin with, (E,).
        schedule: How long and how fast.
        advance: Is told of one more step at a time.

    Returns:
        Weights, rounded as they are written, (E,).

    Raises:
        InvalidFileError: The model computes NaN or infinity.
    """
    engine.model.requires_grad_(False)
    weights = torch.tensor([_away_from_zero(value) for value in start], requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.0)
    rows, shares = _rows(domains)
    made = list(batches(rows, vocabulary_of(engine.model), BATCH_TOKENS))
    generator = torch.Generator().manual_seed(schedule.seed)
    order: list[int] = []
    for step in range(schedule.steps):
        order = order or torch.randperm(len(made), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        optimizer.zero_grad()
        _loss(engine, weights, made[order.pop()], shares).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            weights.clamp_(-LARGEST, LARGEST)
        advance(1)
    found = [rounded(value) for value in weights.tolist()]
    engine.set_weights(dict(zip(engine.bank.names, found, strict=True)))
    return found


def _loss(engine: Engine, weights: Tensor, batch: Batch, shares: Tensor) -> Tensor:
    engine.bank.gates.set(weights)
    with torch.enable_grad():
        found = nats(engine.model, batch)
        loss = (found * shares[batch.cases].to(found.device)).mean()
    if not bool(torch.isfinite(loss)):
        hint = "a smaller --rate, or --dtype float32"
        raise InvalidFileError("logits-not-finite", "the model computes NaN or infinity", hint=hint)
    return loss


def _rows(domains: Sequence[Domain]) -> tuple[list[Row], Tensor]:
    """All records, and how much a token of each counts: 1 on average, every domain as much as any other."""
    cases = [case for domain in domains for case in domain.cases]
    rows = [Row(number, case.tokens, case.learned) for number, case in enumerate(cases)]
    total = sum(float(domain.counts.sum()) for domain in domains)
    shares = [total / (len(domains) * float(domain.counts.sum())) for domain in domains for _ in domain.cases]
    return rows, torch.tensor(shares)


def _away_from_zero(value: float) -> float:
    return value if abs(value) >= SMALLEST else math.copysign(SMALLEST, value)

"""The training loop of the base."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from demo_model.tokens import Batch, Row, batches


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    learning_rate: float
    """Peak rate of AdamW; every rate rises over the first 5 % of the steps and then falls to 3 % along a cosine."""
    matrix_rate: float
    """Peak rate of Muon, which takes the matrices inside the layers."""
    batch_tokens: int = 2048
    """Most tokens in one step, padding included."""
    weight_decay: float = 0.05


def learned_nats(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Loss of each learned token.

    Args:
        model: base, with or without an adapter in it.
        batch: rows of T tokens.

    Returns:
        -log p of each learned token given those before it, (N,), float32, in nats.
    """
    hidden = model.model(input_ids=batch.ids[:, :-1]).last_hidden_state  # (B, T-1, D)
    wanted = batch.is_learned[:, 1:]
    # Only rows that count reach the vocabulary: half of all tokens are the user's.
    logits = model.lm_head(hidden[wanted])  # (N, V)
    return functional.cross_entropy(logits.float(), batch.ids[:, 1:][wanted], reduction="none")


def fit(
    model: Qwen3ForCausalLM,
    stages: Sequence[Sequence[Row]],
    schedule: Schedule,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> None:
    """Train a model, in place.

    Args:
        model: base.
        stages: training text, one stage after the other; each row is seen once.
        schedule: how fast.
        generator: source of the order within a stage.
        say: receives a line of progress now and then.
    """
    optimizers = _optimizers(model, schedule)
    peaks = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    parameters = list(model.parameters())
    pad = int(model.config.pad_token_id)
    steps = [batch for rows in stages for batch in batches(rows, schedule.batch_tokens, pad, generator)]
    began = time.monotonic()
    model.train()
    for step, batch in enumerate(steps):
        pace = _pace(step, len(steps))
        loss = learned_nats(model, batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * pace
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == len(steps) - 1:
            say(f"  step {step + 1}/{len(steps)}  {loss.item():.3f} nats/token  {time.monotonic() - began:.0f} s")
    model.eval()


def _optimizers(model: Qwen3ForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for _, p in named if not any(p is other for other in inner)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(
        inner, lr=schedule.matrix_rate, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98)), muon]


def _pace(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.03 + 0.485 * (1 + math.cos(math.pi * done))

"""How far fixed blends are from the routed model that they stand for, in what they predict.

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))      Kullback and Leibler 1951; in nats per token

p is the routed model's distribution of the next token, q the other one's, at every token of held-out text that is to
be predicted. Zero means that nothing is lost; what the base alone has says how much there is to lose.

A long record is predicted in parts and a part compared in smaller ones, so that memory does not grow with the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe_cli.bake.routed import Case, prompt_of
from lmoe_cli.bank.bank import Bank, build_bank
from lmoe_cli.engine.attach import attach, detach
from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.some_logits import logits_at
from lmoe_cli.loadout.loadout import Loadout

MEANS, UNIFORM, BASE = "mean gates", "uniform", "base"
MAX_LOGITS = 1 << 28
"""Most logits of a model that are kept at a time, where it can leave some out."""
MAX_DOUBLES = 1 << 22
"""Most logits that are compared at a time, in float64."""


@dataclass(frozen=True)
class Divergence:
    """What was measured."""

    records: int
    tokens: int
    """That were predicted."""
    nats: Mapping[str, float]
    """``mean gates``, ``uniform`` and ``base`` → mean KL per token."""
    single: Mapping[str, float]
    """The same of each expert alone, at weight 1."""

    @property
    def best_single(self) -> str | None:
        """The expert that alone is nearest; None where there is none."""
        return min(self.single, key=lambda name: self.single[name], default=None)


def measure(engine: Engine, means: Loadout, cases: Iterable[Case]) -> Divergence:
    """Compare fixed blends with the routed model.

    Args:
        engine: The routed loadout, with its weights in force.
        means: The same experts with mean gates.
        cases: Held-out records.
    """
    names = engine.bank.names
    with engine.alone() as model:
        dtype = next(model.parameters()).dtype
        plain, own = build_bank(model, engine.loadout.published, dtype), build_bank(model, means.live, dtype)
    blends: dict[str, tuple[Bank, list[float]] | None] = {
        MEANS: (own, [expert.weight for expert in means.experts]),
        UNIFORM: (plain, [1 / len(names)] * len(names)),
        BASE: None,
    }
    blends |= {f"={name}": (plain, [float(one == name) for one in names]) for name in names}
    sums = dict.fromkeys(blends, 0.0)
    vocabulary = engine.loadout.base.vocab_size or 1
    records = tokens = 0
    for record, example in cases:
        ids = torch.tensor([example.tokens])
        engine.route(prompt_of(record))
        places = torch.tensor(example.learned[1:], dtype=torch.bool).nonzero().flatten()  # position t predicts t + 1
        for part in torch.split(places, max(1, MAX_LOGITS // vocabulary)):
            with engine.still():
                routed = _logits(engine.model, ids, part)  # (n, V)
            with engine.alone() as model:
                for name, blend in blends.items():
                    with _worn(model, blend):
                        sums[name] += float(kl(routed, _logits(model, ids, part)).sum())
        records, tokens = records + 1, tokens + len(places)
    found = {name: total / max(tokens, 1) for name, total in sums.items()}
    single = {name: found.pop(f"={name}") for name in names}
    return Divergence(records, tokens, found, single)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence of distributions given as logits.

    Args:
        p: (T, V), any float dtype.
        q: (T, V).

    Returns:
        KL(p || q) in nats, (T,), float64.
    """
    rows, parts = max(1, MAX_DOUBLES // p.shape[-1]), []
    for some, others in zip(torch.split(p, rows), torch.split(q, rows), strict=True):
        first, second = torch.log_softmax(some.double(), dim=-1), torch.log_softmax(others.double(), dim=-1)  # (n, V)
        parts.append((first.exp() * (first - second)).sum(-1))
    return torch.cat(parts)


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor, places: Tensor) -> Tensor:
    """Logits at some positions of a text, on the CPU.

    Args:
        model: With a blend on it, or bare.
        ids: (1, T), int64.
        places: (n,), int64.

    Returns:
        (n, V).
    """
    device = next(model.parameters()).device
    return logits_at(model, places.to(device), input_ids=ids.to(device))[0].cpu()


@contextmanager
def _worn(model: nn.Module, blend: tuple[Bank, list[float]] | None) -> Iterator[None]:
    """Put a blend onto the base for the length of a block."""
    if blend is None:
        yield
        return
    bank, gates = blend
    bank.gates.set(gates)
    attach(model, bank.live)
    try:
        yield
    finally:
        detach(model, bank.live)

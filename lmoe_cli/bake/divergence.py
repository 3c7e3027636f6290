"""How far fixed blends are from the routed model that they stand for, in what they predict.

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))      Kullback and Leibler 1951; in nats per token

p is the routed model's distribution of the next token, q the other one's, at every token of held-out text that is to
be predicted. Zero means that nothing is lost; what the base alone has says how much there is to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe_cli.bake.routed import Case, prompt_of
from lmoe_cli.bank.bank import Bank, build_bank
from lmoe_cli.engine.attach import attach, detach
from lmoe_cli.engine.engine import Engine
from lmoe_cli.loadout.loadout import Loadout

MEANS, UNIFORM, BASE = "mean gates", "uniform", "base"


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
        plain, own = build_bank(model, engine.loadout.live, dtype), build_bank(model, means.live, dtype)
    blends: dict[str, tuple[Bank, list[float]] | None] = {
        MEANS: (own, [expert.weight for expert in means.experts]),
        UNIFORM: (plain, [1 / len(names)] * len(names)),
        BASE: None,
    }
    blends |= {f"={name}": (plain, [float(one == name) for one in names]) for name in names}
    sums = dict.fromkeys(blends, 0.0)
    records = tokens = 0
    for record, example in cases:
        learned = torch.tensor(example.learned[1:])
        ids = torch.tensor([example.tokens])
        engine.route(prompt_of(record))
        routed = engine.logits(ids)[0, :-1].cpu()[learned]
        with engine.alone() as model:
            for name, blend in blends.items():
                with _worn(model, blend) as run:
                    sums[name] += float(kl(routed, run(ids)[0, :-1].cpu()[learned]).sum())
        records, tokens = records + 1, tokens + int(learned.sum())
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
    first, second = torch.log_softmax(p.double(), dim=-1), torch.log_softmax(q.double(), dim=-1)
    return (first.exp() * (first - second)).sum(-1)


@contextmanager
def _worn(model: nn.Module, blend: tuple[Bank, list[float]] | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Put a blend onto the base for the length of a block. Yields what computes logits: (B, T) → (B, T, V)."""

    @torch.inference_mode()
    def run(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
        return logits

    if blend is None:
        yield run
        return
    bank, gates = blend
    bank.gates.set(gates)
    attach(model, bank.live)
    try:
        yield run
    finally:
        detach(model, bank.live)

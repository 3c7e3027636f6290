"""What would be without an expert: its weight is 0, and everything else as it was.

    y = W x + sum over e of g_e dW_e x        g_f = 0 for the expert f that is left out

Its share of a softmax goes to nobody: where a router gives it a part of a token, that part then adds nothing. So the
difference is what that expert did, and not also what the others would have done in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lmoe_cli.engine.engine import Engine

CHUNK = 256
"""Tokens whose probabilities are summed at a time, so that logits are not copied whole."""


@contextmanager
def without(engine: Engine, *names: str) -> Iterator[None]:
    """Leave experts out for the length of a block, whatever the router; then everything is as before.

    A folded blend is unfolded meanwhile. Weights must not be turned in the block.

    Args:
        engine: Whose experts.
        names: Of those to leave out; with none, nothing changes.

    Raises:
        NotFoundError: No expert of that name.
    """
    for name in names:
        engine.loadout.expert(name)
    if not names:
        yield
        return
    was_folded = engine.is_folded
    engine.unfold()
    before = engine.weights
    try:
        if engine.router.can_turn:
            engine.set_weights(dict.fromkeys(names, 0.0))
        else:
            gates = engine.router.gates()
            gates[..., [engine.bank.names.index(name) for name in names]] = 0.0
            engine.set_gates(gates)
        yield
    finally:
        if engine.router.can_turn:
            engine.set_weights(before)
        else:
            engine.set_gates(engine.router.gates())
        if was_folded:
            engine.fold()


def log_probabilities(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """How likely each token of a text is after those before it.

    Args:
        engine: With the weights in force; a router that decides per prompt has read it.
        tokens: T of them, at least one.

    Returns:
        log p, (T - 1,), float32, on the CPU: of the second token, the third, and so on. In nats.
    """
    ids = torch.tensor([list(tokens)])
    return chosen(engine.logits(ids)[0], ids[0])


def chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens under logits; see `log_probabilities`.

    Args:
        logits: Of every position, (T, V), any float dtype.
        tokens: (T,), int64.
    """
    parts = []
    for start in range(0, len(tokens) - 1, CHUNK):
        told = logits[start : min(start + CHUNK, len(tokens) - 1)].float()  # (n, V)
        after = tokens[start + 1 : start + 1 + len(told)].to(told.device)
        parts.append((told.gather(1, after[:, None])[:, 0] - told.logsumexp(dim=1)).cpu())
    return torch.cat(parts) if parts else torch.zeros(0)

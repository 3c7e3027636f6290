"""What would be without an expert: its weight is 0, and everything else as it was.

    y = W x + sum over e of g_e dW_e x        g_f = 0 for the expert f that is left out

Its share of a softmax goes to nobody: where a router gives it a part of a token, that part then adds nothing. So the
difference is what that expert did, and not also what the others would have done in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmoe_cli.engine.engine import Engine
from lmoe_cli.errors import InvalidFileError

CHUNK = 256
"""Tokens whose probabilities are summed at a time, so that logits are not copied whole."""
DIGITS = 6
"""Decimals of what is told: more than float32 knows of a log-probability, and short enough to read."""


@dataclass(frozen=True)
class Change:
    """How likely each token is with all experts, and without one of them."""

    expert: str
    before: Tensor
    """log p with all, (N,), float32, in nats."""
    after: Tensor
    """The same without the expert."""

    @property
    def nats(self) -> Tensor:
        """What the expert adds to log p, (N,): above 0 it makes a token likelier."""
        return self.before - self.after

    def token(self, number: int) -> dict[str, float]:
        """One token, as plain values: ``logprob, logprob_without, change``."""
        before, after = float(self.before[number]), float(self.after[number])
        told = {"logprob": before, "logprob_without": after, "change": before - after}
        return {key: round(value, DIGITS) for key, value in told.items()}

    def over(self, numbers: Sequence[int] | None = None) -> dict[str, Any]:
        """Some tokens together, or all: ``tokens, mean_change, total_change``; of none the mean is None."""
        change = (self.nats if numbers is None else self.nats[list(numbers)]).double()
        mean, total = (float(change.mean()) if len(change) else None), float(change.sum())
        return {
            "tokens": len(change),
            "mean_change": None if mean is None else round(mean, DIGITS),
            "total_change": round(total, DIGITS),
        }


@contextmanager
def without(engine: Engine, *names: str) -> Iterator[None]:
    """Leave experts out for the length of a block, whatever the router; then everything is as before.

    A folded blend is unfolded meanwhile. Weights must not be turned in the block. Gates that `Engine.set_gates` gave do
    not come back; those of the router do.

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
            leave_out(engine, *names)
        yield
    finally:
        if engine.router.can_turn:
            engine.set_weights(before)
        else:
            leave_out(engine)
        if was_folded:
            engine.fold()


def leave_out(engine: Engine, *names: str) -> None:
    """Set the gates of a router whose weights do not turn as it gives them, but for some experts: theirs are 0."""
    gates = engine.router.gates()
    gates[..., [engine.bank.names.index(name) for name in names]] = 0.0
    engine.set_gates(gates)


def compare(engine: Engine, tokens: Sequence[int], name: str, *, last: int | None = None) -> Change:
    """A text with all experts, and without one of them.

    Args:
        engine: With the weights in force; a router that decides per prompt has read it. A folded blend is unfolded, so
            that both ways are computed alike.
        tokens: T of them, at least one.
        name: Of the expert to leave out.
        last: How many tokens to tell of, from the end; all but the first when None.

    Returns:
        Of N = T - 1 tokens, the second, the third, and so on; or of the last N.

    Raises:
        NotFoundError: No expert of that name.
        InvalidFileError: The model computes NaN or infinity.
    """
    engine.unfold()
    before = log_probabilities(engine, tokens, last=last)
    with without(engine, name):
        found = Change(name, before, log_probabilities(engine, tokens, last=last))
    if not bool(torch.isfinite(found.nats).all()):
        message = f"with or without {name} the model computes NaN or infinity, so the two cannot be compared"
        raise InvalidFileError("logits-not-finite", message, hint="smaller weights, or --dtype float32")
    return found


def log_probabilities(engine: Engine, tokens: Sequence[int], *, last: int | None = None) -> Tensor:
    """How likely each token of a text is after those before it.

    Args:
        engine: With the weights in force; a router that decides per prompt has read it.
        tokens: T of them, at least one.
        last: How many to tell of, from the end; their logits alone are computed.

    Returns:
        log p, (T - 1,) or (last,), float32, on the CPU: of the second token, the third, and so on. In nats.
    """
    ids = torch.tensor([list(tokens)])
    first = 0 if last is None else len(tokens) - 1 - last
    places = None if last is None else torch.arange(first, len(tokens))
    return chosen(engine.logits(ids, places)[0], ids[0, first:])


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

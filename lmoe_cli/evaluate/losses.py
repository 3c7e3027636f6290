"""How surprised a model is by the tokens that it has to predict.

    L = sum over judged tokens of -log p(token | those before it)        in nats

Kept per token, and added up per record, so that variants can be compared on the very same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.some_logits import logits_at
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.evaluate.domains import Case, runs
from lmoe_cli.router.prompt import PromptRouter

BATCH_TOKENS = 4096
"""Most tokens in a batch, padding included; a longer record is a batch of its own."""
TAIL = 4
"""Most tokens that a template puts after the last answer: of a record that was cut off in a prompt none is judged."""
MAX_LOGITS = 1 << 28
"""Most logits that are computed at a time."""


@dataclass(frozen=True)
class Row:
    """A record, or one turn of it, as it is computed."""

    case: int
    """Number of the case that its loss counts for."""
    tokens: Tensor
    """(T,), int64."""
    learned: Tensor
    """(T,), bool."""
    gates: Tensor | None = None
    """g, (E,), float32, where a router decides per prompt."""


@dataclass(frozen=True)
class Batch:
    """Rows of like length, side by side."""

    cases: Tensor
    """Which case each judged token is of, (N,), int64, in the order of `nats`."""
    positions: Tensor
    """Where it stands there, (N,), int64."""
    tokens: Tensor
    """(B, T), int64. What fills rows up stands behind them, where no token looks."""
    learned: Tensor
    """(B, T), bool."""
    gates: Tensor | None
    """(B, E), where rows have blends of their own."""


def record_nats(engine: Engine, cases: Sequence[Case]) -> Tensor:
    """Loss of each record under the blend in force, (N,), float64, in nats; see `token_nats`."""
    return per_record(token_nats(engine, cases), cases)


def per_record(nats: Tensor, cases: Sequence[Case]) -> Tensor:
    """Sums over the judged tokens of each record, (N,), float64.

    Args:
        nats: From `token_nats`.
        cases: N of them.
    """
    counts = torch.tensor([case.count for case in cases])
    numbers = torch.arange(len(cases)).repeat_interleave(counts)
    return torch.zeros(len(cases), dtype=torch.float64).index_add_(0, numbers, nats.double())


def token_nats(engine: Engine, cases: Sequence[Case], advance: Callable[[int], None] = lambda _: None) -> Tensor:
    """Loss of each judged token under the blend in force.

    Args:
        engine: With the weights to be judged.
        cases: What it has to predict.
        advance: Is told how many more rows are done.

    Returns:
        (N,), float32, in nats: record by record, in the order of the tokens.

    Raises:
        InvalidFileError: The model computes NaN or infinity.
    """
    starts = torch.tensor([0, *(len(case.tokens) for case in cases)]).cumsum(0)
    all_of_them = torch.zeros(int(starts[-1]))
    for batch in batches(rows_of(engine, cases), vocabulary_of(engine.model)):
        if batch.gates is not None:
            engine.set_gates(batch.gates)
        with engine.still(), torch.inference_mode():
            found = nats(engine.model, batch)
        if not bool(torch.isfinite(found).all()):
            hint = "smaller weights, or --dtype float32"
            raise InvalidFileError("logits-not-finite", "the model computes NaN or infinity", hint=hint)
        all_of_them[starts[batch.cases] + batch.positions] = found.cpu()
        advance(len(batch.tokens))
    return all_of_them[torch.cat([case.learned for case in cases])]


def rows_of(engine: Engine, cases: Sequence[Case]) -> list[Row]:
    """Rows to compute: one per record, or one per turn of the assistant where a router decides per prompt.

    Each such row is under the gates that its prompt gives. Texts have no prompt, and the weights alone act on them.
    """
    router = engine.router
    whole = [Row(number, case.tokens, case.learned) for number, case in enumerate(cases)]
    if not isinstance(router, PromptRouter):
        return whole
    found = []
    for row in whole:
        messages, turns = cases[row.case].record.messages, cases[row.case].record.learned
        spans = list(runs(row.learned))
        said = [turn for turn in turns if messages[turn]["content"].strip()]
        is_whole = bool(row.learned[-TAIL:].any())
        if is_whole and len(spans) == len(said) < len(turns):  # an empty answer may have no token to be judged by
            turns = said
        firsts = [turn for turn in turns if turn - 1 not in turns]
        if len(spans) < len(turns) == len(firsts):  # the last ones were cut off
            turns = turns[: len(spans)]
        elif len(spans) == len(firsts):  # turns side by side, as one answer to one prompt
            turns = firsts
        elif len(spans) != len(turns):  # both: all by the first prompt
            spans, turns = [(0, len(row.learned))], turns[:1] or [0]
        for (start, stop), turn in zip(spans, turns, strict=True):
            own = torch.zeros_like(row.learned)
            own[start:stop] = row.learned[start:stop]
            weights = torch.tensor(list(engine.weights.values()), dtype=torch.float32)
            gates = weights * router.route(messages[:turn]).float().cpu() if turn else weights
            found.append(replace(row, tokens=row.tokens[:stop], learned=own[:stop], gates=gates))
    return found


def batches(rows: Sequence[Row], vocabulary: int, budget: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Rows of like length together, the longest first, so that what does not fit the memory shows at once.

    Args:
        rows: In any order.
        vocabulary: V.
        budget: Most tokens in a batch, padding included.
    """
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        longest = len(group[0].tokens) if group else len(row.tokens)
        if group and (len(group) + 1) * longest > max(longest, min(budget, MAX_LOGITS // vocabulary)):
            yield _batch(group)
            group = []
        group.append(row)
    if group:
        yield _batch(group)


def _batch(rows: Sequence[Row]) -> Batch:
    tokens = pad_sequence([row.tokens for row in rows], batch_first=True)  # (B, T)
    learned = pad_sequence([row.learned for row in rows], batch_first=True)  # (B, T)
    cases = torch.tensor([row.case for row in rows]).repeat_interleave(learned.sum(1))
    gates = [row.gates for row in rows if row.gates is not None]
    return Batch(cases, learned.nonzero()[:, 1], tokens, learned, torch.stack(gates) if gates else None)


def nats(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each judged token.

    Args:
        model: With a blend on it.
        batch: Rows of T tokens.

    Returns:
        (N,), float32, row by row.
    """
    device = next(model.parameters()).device
    tokens, learned = batch.tokens.to(device), batch.learned.to(device)
    wanted = learned[:, 1:]  # (B, T-1): position t predicts token t + 1
    kept = wanted.any(0).nonzero().flatten()  # half of all tokens are the user's
    logits = logits_at(model, kept, input_ids=tokens[:, :-1])  # (B, K, V)
    asked, due = wanted[:, kept], tokens[:, 1:][:, kept]
    losses = [
        F.cross_entropy(own[is_asked].float(), target[is_asked], reduction="none")
        for own, target, is_asked in zip(logits, due, asked, strict=True)
    ]
    return torch.cat(losses)


def vocabulary_of(model: nn.Module) -> int:
    """V: rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])

"""Whether a model says, to the letter, what a record has the assistant say last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.sampling import Sampling
from lmoe_cli.errors import UsageError
from lmoe_cli.evaluate.domains import Case

ROOM = 8
"""Tokens that an answer may be longer than the one that is due, before it is given up as another one."""


def is_answered(case: Case) -> bool:
    """Whether a case has an answer to compare with: a conversation whose last message is to be said."""
    count = len(case.record.messages)
    return count > 1 and case.record.is_learned(count - 1)


def matches(engine: Engine, cases: Sequence[Case], advance: Callable[[int], None] = lambda _: None) -> Tensor:
    """Answer the last turn of every case greedily, and compare.

    Args:
        engine: With the weights to be judged.
        cases: Each with an answer.
        advance: Is told of one more case at a time.

    Returns:
        1 where the answer is the one that is due but for white space around it, else 0; (N,), float64.
    """
    found = [_matches(engine, case, advance) for case in cases]
    return torch.tensor(found, dtype=torch.float64)


def _matches(engine: Engine, case: Case, advance: Callable[[int], None]) -> bool:
    messages = case.record.messages
    due = messages[-1]["content"].strip()
    most = len(engine.tokenizer(due, verbose=False)["input_ids"]) + ROOM
    advance(1)
    try:
        answer = engine.stream(messages[:-1], Sampling(temperature=0, max_new_tokens=most))
    except UsageError as error:
        if error.code != "context-full":
            raise
        return False
    for _ in answer:
        if not due.startswith(answer.text.strip()):
            return False
    return answer.text.strip() == due

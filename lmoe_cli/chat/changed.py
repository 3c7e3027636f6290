"""What an expert would have made of an answer that was given without it, token by token."""

from __future__ import annotations

from typing import Any

from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.generate import Generation
from lmoe_cli.engine.trace import texts
from lmoe_cli.engine.without import compare

BEFORE = 8
"""Tokens of the prompt that are decoded with the answer, since tokenizers treat the start of a text differently."""


def changed(engine: Engine, generation: Generation, name: str) -> dict[str, Any]:
    """The answer with all experts, beside the same without one.

    Args:
        engine: With all experts; a router that decides per prompt has read it.
        generation: The answer, complete.
        name: Of the expert.

    Returns:
        ``expert, of, tokens, mean_change, total_change``, as `lmoe route` tells them, and ``changes``: of each token of
        the answer ``id, text, logprob, logprob_without, change``.

    Raises:
        InvalidFileError: The model computes NaN or infinity.
    """
    prompt, said = generation.prompt, generation.said
    change = compare(engine, [*prompt, *said], name, last=len(said))
    before = prompt[-BEFORE:]
    shown = texts(engine, [*before, *said])[len(before) :]
    tokens = [
        {"id": token, "text": text, **change.token(number)}
        for number, (token, text) in enumerate(zip(said, shown, strict=True))
    ]
    return {"expert": name, "of": "answer", **change.over(), "changes": tokens}

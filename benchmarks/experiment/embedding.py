"""What an encoder would decide by the pass that reads a prompt anyway, rather than by the base's own.

That pass is under some blend: evenly all experts, or what the prompt before was sent to. Its states are then no longer
those that prototypes were made of, and what a prompt is sent to depends on what was asked before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.experiment.base import read_conversations
from lmoe_cli.engine.build import load
from lmoe_cli.engine.embed import mean_state, middle_block
from lmoe_cli.engine.engine import Engine
from lmoe_cli.router.encoder import EncoderRouter

EVEN, BEFORE = "evenly", "as before"


def measure(recipe: Path, place: Path, domains: Sequence[str], *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Send held-out prompts of all domains, in random order, to experts.

    Args:
        recipe: With an encoder, and an expert for each domain under its name.
        place: Of the experiment.
        domains: Their names.
        seed: Of the order.

    Returns:
        ``base`` and other ways to read the text → ``agreement``, the share of prompts whose first expert is that of
        their domain; ``elsewhere``, the share whose first expert is not the one by the base; and ``moved``, the mean
        share of the gates that is not where the base puts it.
    """
    engine = load(recipe, device="cpu", dtype="float32")
    talks = {name: read_conversations(place / f"data/{name}.jsonl", "valid", 10**6) for name in domains}
    asked = [(name, _prompt(talk)) for name, own in talks.items() for talk in own]
    random.Random(seed).shuffle(asked)
    names, count = engine.bank.names, len(engine.bank.names)
    even = torch.full((1, count), 1 / count)
    found = {way: {"agreement": 0.0, "elsewhere": 0.0, "moved": 0.0} for way in ("base", EVEN, BEFORE)}
    before = even
    for domain, text in asked:
        gates = {"base": _decided(engine, text, None), EVEN: _decided(engine, text, even)}
        gates[BEFORE] = _decided(engine, text, before)
        for way, own in gates.items():
            found[way]["agreement"] += (names[int(own.argmax())] == domain) / len(asked)
            found[way]["elsewhere"] += float(own.argmax() != gates["base"].argmax()) / len(asked)
            found[way]["moved"] += float((own - gates["base"]).abs().sum() / 2) / len(asked)
        before = gates["base"][None]
    return found


def _decided(engine: Engine, text: str, gates: Tensor | None) -> Tensor:
    """Gates of a prompt, (E,): by the base's pass, or by one under gates (1, E)."""
    router, asked = engine.router, [{"role": "user", "content": text}]
    assert isinstance(router, EncoderRouter)
    if gates is None:
        return router.route(asked)
    own, block = router._embed, middle_block(engine.model, router.settings.layer)
    tokens = engine.tokenizer(text)["input_ids"][: engine.context]
    with engine.still():
        engine.bank.gates.set(gates)
        state = mean_state(engine.model, block, tokens)
    router._embed = lambda _: state
    try:
        return router.route(asked)
    finally:
        router._embed = own


def _prompt(talk: Sequence[dict[str, str]]) -> str:
    return next(message["content"] for message in talk if message["role"] == "user")

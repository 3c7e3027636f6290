"""What is measured of each variant: loss with intervals, agreement of the gate with the domain, speed."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lmoe_cli
from benchmarks.experiment.base import read_conversations
from lmoe_cli.router.prompt import PromptRouter
from lmoe_cli.router.token import TokenRouter

RECORDS = 12
"""Conversations per domain that agreement is measured on."""
TURNS, TOKENS = 5, 48
"""Answers that speed is measured by, and their length."""


def evaluate(recipe: Path, folder: Path, domains: Sequence[str]) -> dict[str, Any]:
    """What `lmoe eval --json` says of a recipe on what is held out of every domain."""
    command = [sys.executable, "-m", "lmoe_cli", "eval", str(recipe), "--json", "--device", "cpu", "--split", "valid"]
    for domain in domains:
        command += ["--data", f"{domain}={folder / 'data' / f'{domain}.jsonl'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)["data"]
    return found


def agreement(recipe: Path, folder: Path, domains: Sequence[str]) -> dict[str, float]:
    """Share of the held-out tokens, over places, at which a domain's own expert has the largest gate."""
    engine = lmoe_cli.load(recipe, device="cpu")
    names = [expert.name for expert in engine.loadout.experts]
    found = {}
    for domain in domains:
        hits, count = 0.0, 0
        for messages in read_conversations(folder / f"data/{domain}.jsonl", "valid", RECORDS):
            if isinstance(engine.router, TokenRouter):
                tokens = engine.tokenizer.apply_chat_template(messages)["input_ids"][: engine.context]
                with engine.router.watched() as seen:
                    engine.logits(torch.tensor([tokens]))
                best = torch.cat([gates.flatten(0, -2).argmax(-1) for one in seen.values() for gates in one])
            elif isinstance(engine.router, PromptRouter):
                best = engine.router.route(messages[:-1]).argmax()[None]
            hits += float((best == names.index(domain)).sum())
            count += best.numel()
        found[domain] = hits / count
    return found


def speeds(recipes: Mapping[str, Path]) -> dict[str, float]:
    """Tokens per second of a greedy answer of each recipe, and of the ``base`` of the first: medians of turns.

    All are loaded at once and answer by turns, so that what disturbs the machine disturbs all of them.
    """
    engines = {name: lmoe_cli.load(recipe, device="cpu") for name, recipe in recipes.items()}
    engines["base"] = lmoe_cli.load(next(iter(recipes.values())), device="cpu")
    engines["base"].detach()
    found: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(TURNS + 1):
        for name, engine in engines.items():
            started = time.perf_counter()
            answer = engine.stream("Write a program.", engine.sampling.with_(temperature=0, max_new_tokens=TOKENS))
            count = sum(1 for _ in answer)
            if turn:
                found[name].append(count / (time.perf_counter() - started))
    return {name: statistics.median(own) for name, own in found.items()}

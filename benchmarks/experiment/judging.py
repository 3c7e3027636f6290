"""What is measured of each variant: loss with intervals, agreement of the gate with the domain, speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lmoe_cli
from benchmarks.experiment.base import read_conversations
from lmoe_cli.router.prompt import PromptRouter
from lmoe_cli.router.token import TokenRouter

RECORDS = 12
"""Conversations per domain that agreement is measured on."""


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


def speed(recipe: Path, *, base: bool = False) -> float:
    """Tokens per second of a greedy answer of 64 tokens, the best of three."""
    engine = lmoe_cli.load(recipe, device="cpu")
    if base:
        engine.detach()
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        generation = engine.stream("Write a program.", engine.sampling.with_(temperature=0, max_new_tokens=64))
        count = sum(1 for _ in generation)
        best = max(best, count / (time.perf_counter() - started))
    return best

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
from torch import Tensor

import lmoe_cli
from benchmarks.experiment.base import read_conversations
from lmoe_cli.cli.judged import Judged
from lmoe_cli.engine.engine import Engine
from lmoe_cli.evaluate.measure import measure
from lmoe_cli.evaluate.report import report
from lmoe_cli.evaluate.variants import open_stage, other, plan
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.router.prompt import PromptRouter
from lmoe_cli.router.token import TokenRouter

KEPT = ("base", "recipe", "uniform", "random", "oracle")
"""What is kept of every evaluation; of the first also each expert alone, which is the same in all."""
RECORDS = 12
"""Conversations per domain that routing is looked at on."""
TURNS, TOKENS = 5, 48
"""Answers that speed is measured by, and their length."""


def evaluate(recipe: Path, folder: Path, domains: Sequence[str], *, each: bool = False) -> dict[str, Any]:
    """What `lmoe eval --json` says of a recipe on what is held out of every domain.

    Args:
        recipe: To be judged.
        folder: With the data.
        domains: Names of its files.
        each: Keep what it says of each expert alone.
    """
    command = [sys.executable, "-m", "lmoe_cli", "eval", str(recipe), "--json", "--device", "cpu", "--split", "valid"]
    for domain in domains:
        command += ["--data", f"{domain}={folder / 'data' / f'{domain}.jsonl'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)["data"]
    return {"variants": [row for row in found["variants"] if row["name"] in KEPT or (each and row["kind"] == "expert")]}


def beside(recipe: Path, against: Path, name: str, folder: Path, domains: Sequence[str]) -> dict[str, Any]:
    """Loss of another recipe on the same base and the same held-out records, and how much less the first one's is."""
    first, second = (resolve(read_recipe(path), str(path), beside=path.parent) for path in (recipe, against))
    variants = [*(one for one in plan(first, seed=None) if one.name == "recipe"), other(name, second)]
    stage = open_stage(variants, device="cpu")
    files = {domain: folder / "data" / f"{domain}.jsonl" for domain in domains}
    judged = Judged(files, {}, split="valid", limit=None, max_tokens=None, too_long="truncate").read(stage, files)
    return report(variants, judged, measure(stage, variants, judged), {})[-1]


def routing(recipe: Path, folder: Path, domains: Sequence[str]) -> dict[str, Any]:
    """What a router does with held-out text.

    Returns:
        ``agreement``, domain → share of its tokens, over places, at which its own expert has the largest gate; and
        ``in_use``, the mean over places of exp of the entropy of the mean gates over all of them, made to sum to 1.
    """
    engine = lmoe_cli.load(recipe, device="cpu")
    names = [expert.name for expert in engine.loadout.experts]
    agreed, sums = {}, dict[str, Tensor]()
    for domain in domains:
        hits, count = 0.0, 0
        for messages in read_conversations(folder / f"data/{domain}.jsonl", "valid", RECORDS):
            for place, gates in _gates(engine, messages).items():
                hits += float((gates.argmax(-1) == names.index(domain)).sum())
                count += len(gates)
                sums[place] = sums.get(place, 0) + (gates / gates.sum(-1, keepdim=True).clamp(min=1e-9)).sum(0)
        agreed[domain] = hits / count
    shares = torch.stack(list(sums.values()))
    shares /= shares.sum(-1, keepdim=True)
    used = torch.special.entr(shares).sum(-1).exp().mean()
    return {"agreement": agreed, "in_use": float(used)}


def _gates(engine: Engine, messages: list[dict[str, str]]) -> dict[str, Tensor]:
    """Place → gates of the tokens of a conversation, (N, E), or of its prompt, (1, E)."""
    if isinstance(engine.router, PromptRouter):
        return {"prompt": engine.router.route(messages[:-1])[None].float()}
    assert isinstance(engine.router, TokenRouter), "no other router decides anything"
    tokens = engine.tokenizer.apply_chat_template(messages)["input_ids"][: engine.context]
    with engine.router.watched() as seen:
        engine.logits(torch.tensor([tokens]))
    return {place: torch.cat([gates.flatten(0, -2) for gates in one]).float() for place, one in seen.items()}


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

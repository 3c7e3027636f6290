"""The trainings and recipes that are compared."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.experiment.base import read_conversations
from lmoe_cli.train.config import TrainConfig
from lmoe_cli.train.order import Order
from lmoe_cli.train.training import train

RANK = 8
GATES: dict[str, dict[str, Any]] = {
    "softmax": {"activation": "softmax", "share": "site"},
    "top-2": {"activation": "topk", "top_k": 2, "share": "site"},
    "hard1": {"activation": "hard1", "share": "site"},
}
TRAINER = {"batch_size": 24, "max_length": 192, "packing": True, "seed": 0}
EXPERT_RATE, GATE_RATE = 3e-3, 2e-2


def write_data(source: Path, folder: Path, domains: Sequence[str], most: Mapping[str, int]) -> None:
    """Write a file per domain with so many records of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        lines = [
            json.dumps({"messages": messages, "split": split})
            for split, count in most.items()
            for messages in read_conversations(source / f"{domain}.jsonl", split, count)
        ]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")


def repeats(folder: Path, domains: Sequence[str]) -> dict[str, int]:
    """Domain → times that its conversations come in a pass over all domains.

    The table's mean counts each domain alike, while a loss counts each token: what is trained on all of them reads the
    shortest answers as often as it takes to come near the median.
    """
    said = {
        name: sum(
            len(one["content"])
            for messages in read_conversations(folder / f"data/{name}.jsonl", "train", 10**6)
            for one in messages
            if one["role"] == "assistant"
        )
        for name in domains
    }
    middle = statistics.median(said.values())
    return {name: max(1, round(middle / own)) for name, own in said.items()}


def _quietly(_: dict[str, Any]) -> None:
    """Nobody watches."""


def _train(told: dict[str, Any], folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    out = folder / name
    started = time.perf_counter()
    config = TrainConfig.model_validate({"base": "./base", "trainer": TRAINER, **told})
    report = train(Order(config, folder, out, device="cpu", force=True), _quietly)
    report["seconds"] = round(time.perf_counter() - started, 1)
    return out, report


def train_experts(folder: Path, domains: Sequence[str], epochs: int) -> tuple[Path, dict[str, Any]]:
    """One expert per domain, all in one pass over mixed batches."""
    experts = {name: {"rank": RANK, "data": f"data/{name}.jsonl"} for name in domains}
    stages = [{"train": "experts", "together": True, "epochs": epochs, "learning_rate": EXPERT_RATE}]
    return _train({"experts": experts, "stages": stages}, folder, "experts")


def train_one(folder: Path, domains: Sequence[str], epochs: int) -> tuple[Path, dict[str, Any]]:
    """One LoRA with as many parameters as all experts have, on the data of all, as gates read it."""
    data = [{"train": f"data/{name}.jsonl", "repeat": times} for name, times in repeats(folder, domains).items()]
    experts = {"one": {"rank": RANK * len(domains), "data": data}}
    stages = [{"train": "experts", "epochs": epochs, "learning_rate": EXPERT_RATE}]
    return _train({"experts": experts, "stages": stages}, folder, "one")


def train_gate(
    folder: Path, domains: Sequence[str], kind: str, stage: str, epochs: float
) -> tuple[Path, dict[str, Any]]:
    """A gate over the trained experts, alone or jointly with them."""
    experts = {
        name: {
            "adapter": str(folder / "experts" / "experts" / name),
            "data": {"train": f"data/{name}.jsonl", "repeat": times},
        }
        for name, times in repeats(folder, domains).items()
    }
    stages = [{"train": stage, "epochs": epochs, "gate_learning_rate": GATE_RATE}]
    if stage == "joint":
        stages[0]["learning_rate"] = EXPERT_RATE / 3
    told = {"experts": experts, "gate": GATES[kind], "stages": stages}
    return _train(told, folder, f"{stage}-{kind}")


def write_recipe(folder: Path, name: str, domains: Sequence[str], router: dict[str, Any]) -> Path:
    """A recipe over the trained experts with a router that is not trained."""
    experts: dict[str, Any] = {}
    for domain in domains:
        texts = [
            messages[0]["content"] for messages in read_conversations(folder / f"data/{domain}.jsonl", "train", 16)
        ]
        experts[domain] = {"adapter": f"./experts/experts/{domain}", "examples": texts}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": "./base", "experts": experts, "router": router}, sort_keys=False))
    return path

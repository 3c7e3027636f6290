"""The classes: experts on the frozen base, each trained on its own conversations by `lmoe train`."""

import json
import random
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from demo_model.blends import Expert
from demo_model.conversations import Conversation, class_conversations
from demo_model.model import ADAPTERS
from demo_model.stored import BASE, read_adapter
from demo_model.tables import CLASSES, Tables
from lmoe_cli.train.config import TrainConfig
from lmoe_cli.train.order import Order
from lmoe_cli.train.training import train

STRENGTHS = {1.0: 0.5, 0.8: 0.125, 0.6: 0.125, 0.4: 0.125, 0.2: 0.125}
"""Weights that an expert is trained at, and the share of its conversations for each, so that half a weight is heard as
half a voice: what an adapter does at weights it never met is anybody's guess."""
STAGE = {"train": "experts", "epochs": 1, "learning_rate": 2e-3, "weight_decay": 0.01}
TRAINER = {"batch_size": 2, "max_length": 1024, "packing": True, "precision": "float32", "log_every": 100}


def write_class_data(tables: Tables, folder: Path, count: int, seed: int) -> None:
    """Write a JSONL file per class and strength.

    Args:
        tables: what to draw from.
        folder: must be there.
        count: conversations of each class.
        seed: of all choices.
    """
    for number, name in enumerate(CLASSES):
        rng = random.Random(seed + number)
        for strength, share in STRENGTHS.items():
            own = islice(class_conversations(tables, name, rng, strength), int(count * share))
            (folder / _file(name, strength)).write_text(_lines(own), encoding="utf-8")


def train_classes(folder: Path, seed: int, say: Callable[[str], None]) -> tuple[dict[str, Expert], dict[str, int]]:
    """Train an expert per class.

    Args:
        folder: with the base, and what `write_class_data` wrote.
        seed: of the training.
        say: receives a line of progress now and then.

    Returns:
        Class to its expert, and to the number of tokens that its loss asked for.
    """
    tokens = dict.fromkeys(CLASSES, 0)

    def tell(event: dict[str, Any]) -> None:
        if "loss" in event:
            name = event["run"].rpartition("-")[2]
            tokens[name] += event["tokens"]
            if event["step"] % TRAINER["log_every"] == 0:
                say(f"  {name}  step {event['step']}  {event['loss']:.3f} nats/token")

    out = folder / "trained"
    train(Order(_config(seed), folder, out, device="cpu"), tell)
    return {name: read_adapter(ADAPTERS[name], out / "experts" / name) for name in CLASSES}, tokens


def _config(seed: int) -> TrainConfig:
    experts = {
        name: {
            "rank": ADAPTERS[name].rank,
            "alpha": ADAPTERS[name].alpha,
            "rslora": ADAPTERS[name].is_rank_stabilised,
            "targets": list(ADAPTERS[name].targets),
            "data": [{"train": _file(name, strength), "strength": strength} for strength in STRENGTHS],
        }
        for name in CLASSES
    }
    told = {"base": f"./{BASE}", "experts": experts, "stages": [STAGE], "trainer": {**TRAINER, "seed": seed}}
    return TrainConfig.model_validate(told)


def _file(name: str, strength: float) -> str:
    return f"{name}-{strength}.jsonl"


def _lines(conversations: Iterable[Conversation]) -> str:
    lines = []
    for conversation in conversations:
        messages: list[dict[str, Any]] = []
        for message in conversation:
            read_only = message.role == "assistant" and not message.is_learned
            messages.append({"role": message.role, "content": message.content} | ({"weight": 0} if read_only else {}))
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)

"""A tiny base with a tokenizer and a few conversations, made once, and trainings of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import tiny
import tiny_tokenizer
from laws.cases import ROOT

from lmoe_cli.train.config import TrainConfig
from lmoe_cli.train.order import Order
from lmoe_cli.train.training import train

TOPICS = {
    "sums": [("add {} and {}", "it is {}")],
    "words": [("say {} {}", "word {} said")],
    "names": [("who is {} {}", "the name is {}")],
}


@functools.cache
def base(arch="llama"):
    return tiny_tokenizer.save_tokenizer(tiny.save_base(arch, ROOT / f"train-{arch}"))


def write_data(path, topic, count=24, valid=6, **extra):
    lines = []
    for number in range(count):
        asked, said = TOPICS[topic][0]
        messages = [
            {"role": "user", "content": asked.format(number, number * 7 % 11)},
            {"role": "assistant", "content": said.format(number * 5 % 13)},
        ]
        split = {"split": "valid"} if number >= count - valid else {}
        lines.append(json.dumps({"messages": messages, **split, **extra}))
    path.write_text("\n".join(lines) + "\n")
    return path


def config(folder, stages, experts=("sums", "words", "names"), arch="llama", earlier=None, **words):
    """A config over topics, each an expert with data of its own, written into a folder.

    Args:
        earlier: What an earlier training wrote, whose experts are gone on with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {}
    for topic in experts:
        if not (folder / f"{topic}.jsonl").exists():
            write_data(folder / f"{topic}.jsonl", topic)
        told[topic] = {"rank": 2, "targets": "all-linear", "data": f"{topic}.jsonl"}
        if earlier:
            told[topic] = {"adapter": str(earlier / "experts" / topic), "data": f"{topic}.jsonl"}
    trainer = {"batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "gate_learning_rate": 1e-2}
    whole = {"base": str(base(arch)), "experts": told, "stages": stages, **words}
    whole["trainer"] = trainer | words.get("trainer", {})
    return TrainConfig.model_validate(whole)


def run(made, folder, name="out", tell=lambda event: None, **words):
    """Train into a folder and return it."""
    out = Path(folder, name)
    train(Order(made, Path(folder), out, device="cpu", **words), tell)
    return out


def bytes_of(out):
    """Every file that a training wrote → its bytes, but for times."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix in (".safetensors", ".yaml")
    }

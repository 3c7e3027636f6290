"""The party: scenes, each answered by the class at home there; the gate between the classes learns from them."""

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from demo_model.answers import answer_scene
from demo_model.manners import Manner
from demo_model.scenes import draw_scene
from demo_model.tables import CLASSES, Tables, read_tables
from lmoe_cli.train.config import read_config
from lmoe_cli.train.order import Order
from lmoe_cli.train.training import train

PARTY = "party"

TRAIN, VALID = 500, 40
"""Conversations of each class to learn from, and of scenes that no training text contains."""


def write_party_data(tables: Tables, folder: Path, seed: int) -> None:
    """Write one JSONL file of conversations per class.

    Args:
        tables: what to draw from.
        folder: must be there.
        seed: of all choices.
    """
    for number, voice in enumerate(CLASSES):
        rng = random.Random(seed + number)
        lines = [*_lines(tables, voice, rng, "train", TRAIN), *_lines(tables, voice, rng, "valid", VALID)]
        (folder / f"{voice}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(tables: Tables, voice: str, rng: random.Random, split: str, count: int) -> Iterator[str]:
    while count:
        scene, prompt = draw_scene(tables, rng, held_out=split == "valid")
        if tables.kinds[scene.kind].home == voice:
            answer = answer_scene(tables, scene, Manner({voice: 1.0}), rng)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield json.dumps({"messages": messages, "split": split}, ensure_ascii=False)
            count -= 1


def train_party(package: Path, recipes: Path, seed: int) -> None:
    """Train the gate of the embedded classes by the recipe for it, and put it beside them.

    Args:
        package: folder with the base and its adapters, as ``demo:`` means them.
        recipes: folder with ``train-party.yaml``, and with its data, which is written again.
        seed: of the data.
    """
    write_party_data(read_tables(), recipes / "party", seed)
    config = read_config(recipes / "train-party.yaml")
    with tempfile.TemporaryDirectory(prefix="lmoe-party-") as folder:
        out = Path(folder, "party")
        train(Order(config, recipes, out, device="cpu"), lambda _event: None)
        shutil.rmtree(package / PARTY, ignore_errors=True)
        shutil.copytree(out / "router", package / PARTY)

"""The party: scenes, each answered by the class that is at home there. The gate between the classes learns from them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from demo_model.answers import answer_scene
from demo_model.manners import Manner
from demo_model.scenes import draw_scene
from demo_model.tables import CLASSES, Tables

TRAIN, VALID = 240, 40
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

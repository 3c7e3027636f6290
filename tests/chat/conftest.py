from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_tokenizer

RECIPE = """\
version: 1
name: tinymage
base: ./base
experts:
  warrior: {adapter: ./warrior, weight: 0.6}
  mage:
    adapter: ./mage
    weight:
      - {match: self_attn, value: 0.5}
      - {match: "*", value: 0.3}
  healer: {adapter: ./healer, weight: 0.1}
chat: {temperature: 0, max_new_tokens: 12}
"""


@pytest.fixture(scope="session")
def tinymage(tmp_path_factory) -> Path:
    """A recipe of a tiny talkative base and three experts on it."""
    folder = tmp_path_factory.mktemp("tinymage")
    model = tiny.model("qwen3", max_position_embeddings=160)
    model.model.embed_tokens.weight.data[: len(tiny_tokenizer.SPECIAL)] = 0  # it seldom ends a turn
    model.save_pretrained(folder / "base")
    tiny_tokenizer.save_tokenizer(folder / "base")
    for seed, name in enumerate(("warrior", "mage", "healer"), start=1):
        tiny.save_adapter(folder / "base", "lora", folder / name, seed=seed)
    (folder / "tinymage.yaml").write_text(RECIPE)
    (folder / "static.yaml").write_text(RECIPE.replace("chat:", "router: {type: static}\nchat:"))
    return folder / "tinymage.yaml"

"""A tokenizer of single bytes, small enough for a tiny base, with and without a chat template."""

from __future__ import annotations

import json
from pathlib import Path

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"-:;()/=_*#$%&@[]{}~"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<answer>", "<system>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}<system>{% elif message.role == 'user' %}<user>{% else %}<answer>{% endif %}"
    "{{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def save_tokenizer(folder: Path, *, template: bool = True) -> Path:
    """Write a tokenizer of 96 tokens at most, one per character, into the folder of a base."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    added = [
        {
            "id": number,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for number, token in enumerate(SPECIAL)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": TEMPLATE} if template else {}))
    )
    return folder

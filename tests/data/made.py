"""Data files and tokenizers to try."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_tokenizer import save_tokenizer
from transformers import AutoTokenizer


def written(path: Path, *entries) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def said(*turns: str, first: str = "user", **more) -> dict:
    """A conversation whose turns alternate, beginning with the user's."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], **more}


def tiny_tokenizer(folder: Path, template: str | None = None, *, plain: bool = False):
    """A tokenizer of single characters; with its own chat template, another, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder, template=not plain))
    if template:
        tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer, *parts: str) -> list[int]:
    """Numbers of special tokens (in angle brackets) and of the characters of other parts."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[one] for part in parts for one in ([part] if part.startswith("<") else part)]

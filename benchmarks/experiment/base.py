"""A small base trained by the project: a tokenizer and a model of the domains' text, all mixed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 2048
CONTEXT = 256
ROWS = 24
"""Rows of a training step."""


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1], model_max_length=CONTEXT
    )
    made.chat_template = TEMPLATE
    return made


def train_base(conversations: Sequence[list[dict[str, str]]], folder: Path, *, epochs: int, seed: int) -> float:
    """Train a base on conversations, every token of them, and save it with its tokenizer.

    Returns:
        Loss of the last tenth of the steps, nats per token.
    """
    tokenizer = make_tokenizer([one["content"] for messages in conversations for one in messages])
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    stream = [token for messages in conversations for token in tokenizer.apply_chat_template(messages)["input_ids"]]
    width = CONTEXT // 2
    rows = torch.tensor(stream[: len(stream) // width * width]).view(-1, width)
    steps = epochs * (len(rows) // ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    mixed, losses = random.Random(seed), []
    order: list[int] = []
    for _ in range(steps):
        if len(order) < ROWS:
            order = list(range(len(rows)))
            mixed.shuffle(order)
        batch = rows[[order.pop() for _ in range(ROWS)]]
        logits = model(input_ids=batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def read_conversations(path: Path, split: str, most: int) -> list[list[dict[str, str]]]:
    """The first conversations of a split of a data file."""
    found = []
    for line in filter(None, path.read_text().split("\n")):
        entry = json.loads(line)
        if entry.get("split") == split:
            found.append([{key: one[key] for key in ("role", "content")} for one in entry["messages"]])
        if len(found) == most:
            break
    return found

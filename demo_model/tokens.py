"""Words to token ids: the demo's tokenizer, and conversations as training rows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo_model.conversations import Conversation

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Row:
    """One conversation as tokens."""

    ids: tuple[int, ...]
    is_learned: tuple[bool, ...]
    """For every token, whether the loss asks for it."""


@dataclass(frozen=True)
class Batch:
    """Rows of like length."""

    ids: Tensor
    """Token ids, (B, T), int64."""
    is_learned: Tensor
    """Whether the loss asks for it, (B, T), bool."""


def train_tokenizer(texts: Iterable[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that speaks the ChatML layout.

    Args:
        texts: messages to learn merges from.
        vocabulary: number of tokens, special ones included.
        max_length: longest input that the model takes, in tokens.

    Returns:
        The tokenizer with its chat template; `<|im_end|>` ends an answer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The role names stand in every conversation, so they earn their merges like other words.
    tokenizer.train_from_iterator((f"system\nuser\nassistant\n{text}" for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation]) -> list[Row]:
    """Conversations as rows, laid out as the chat template does.

    Args:
        tokenizer: from `train_tokenizer`.
        conversations: what was said.

    Returns:
        One row per conversation. Learned are the content of each learned message and the `<|im_end|>` after it.
    """
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    newline = _ids(tokenizer, ["\n"])[0]
    texts = [f"{m.role}\n{m.content}" for conversation in conversations for m in conversation]
    encoded = iter(_ids(tokenizer, texts))
    heads = {role: len(_ids(tokenizer, [f"{role}\n"])[0]) for role in ("system", "user", "assistant")}
    rows = []
    for conversation in conversations:
        ids: list[int] = []
        is_learned: list[bool] = []
        for message in conversation:
            body = next(encoded)
            head = 1 + heads[message.role]
            ids += [start, *body, end, *newline]
            is_learned += [False] * head + [message.is_learned] * (len(body) + 2 - head) + [False] * len(newline)
        rows.append(Row(tuple(ids), tuple(is_learned)))
    return rows


def batches(rows: Sequence[Row], budget: int, pad: int, generator: torch.Generator) -> Iterator[Batch]:
    """Rows of like length side by side, in random order.

    Args:
        rows: each is used once.
        budget: most tokens in one batch, padding included; a longer row makes a batch of its own.
        pad: token id that fills rows up on the right, where causal attention never looks.
        generator: source of the order.

    Yields:
        The batches.
    """
    drawn = torch.randperm(len(rows), generator=generator).tolist()
    groups: list[list[Row]] = [[]]
    for index in sorted(drawn, key=lambda i: len(rows[i].ids)):
        row, group = rows[index], groups[-1]
        if group and len(row.ids) * (len(group) + 1) > budget:
            groups.append([])
        groups[-1].append(row)
    for which in torch.randperm(len(groups), generator=generator).tolist():
        group = groups[which]
        width = max(len(row.ids) for row in group)
        ids = torch.tensor([row.ids + (pad,) * (width - len(row.ids)) for row in group])  # (B, T)
        is_learned = torch.tensor([row.is_learned + (False,) * (width - len(row.ids)) for row in group])  # (B, T)
        yield Batch(ids, is_learned)


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded

"""The whole demo, from nothing: tokenizer, base, three experts, and the numbers that say whether they are good."""

import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demo_model.blends import MIXES, Expert, Words, blend, marker_words
from demo_model.classes import train_classes, write_class_data
from demo_model.conversations import base_conversations
from demo_model.evaluate import Matrix, evaluate, held_out_prompts, held_out_rows
from demo_model.model import Size, new_base, round_to_bfloat16
from demo_model.stored import BASE, read_base, write_base
from demo_model.tables import CLASSES, Tables, read_tables
from demo_model.tokens import encode, train_tokenizer
from demo_model.train import Schedule, fit

"""Threads of every product; another number gives other roundings, and so other bytes."""

BASE_SCHEDULE = Schedule(learning_rate=6e-3, matrix_rate=3e-3)


@dataclass(frozen=True)
class Settings:
    """How large the demo is and how long it trains."""

    seed: int = 20
    """Every source of randomness is seeded with this number plus its own."""
    size: Size = field(default_factory=Size)
    single: int = 40_000
    """Conversations of one message that the base begins with: they teach it to copy what a scene names."""
    mixed: int = 34_000
    """Conversations of one to ten messages that it goes on with."""
    own: int = 5_000
    """Conversations that each adapter sees."""
    scenes: int = 200
    """Held-out scenes in the matrix."""
    prompts: int = 100
    """Held-out prompts in the table of blends."""
    threads: int = 2
    """Of torch; another number sums in another order."""


QUICK = Settings(
    size=Size(vocabulary=600, width=64, layers=2, feed_forward=96, heads=2, key_value_heads=1),
    single=60,
    mixed=20,
    own=24,
    scenes=4,
    prompts=1,
    threads=1,
)
"""Seconds instead of minutes, and no good as a model."""


@dataclass(frozen=True)
class Demo:
    """Everything that was trained and measured."""

    tokenizer: PreTrainedTokenizerFast
    base: Qwen3ForCausalLM
    """Weights in float32, each already rounded to the bfloat16 that is stored."""
    experts: Mapping[str, Expert]
    matrix: Matrix
    words: Mapping[str, Words]
    """Blend, as written in `MIXES`, to how often each class can be heard in it."""
    tokens: Mapping[str, int]
    """Model to the number of tokens that its training loss asked for."""


def make_demo(settings: Settings, say: Callable[[str], None], kept: Path | None = None) -> Demo:
    """Train and measure the demo.

    Args:
        settings: how large and how long. The same settings give the same bytes on the same machine.
        say: receives progress, line by line.
        kept: folder of a base that these settings gave before; its classes alone are trained.

    Returns:
        The demo, not yet judged.
    """
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    seed = settings.seed
    tables = read_tables()
    single = list(islice(base_conversations(tables, random.Random(seed + 1), turns=1), settings.single))
    mixed = list(islice(base_conversations(tables, random.Random(seed + 2)), settings.mixed))
    if kept:
        base, tokenizer = read_base(kept)
    else:
        texts = (message.content for conversation in single for message in conversation)
        tokenizer = train_tokenizer(texts, settings.size.vocabulary, settings.size.context)
        base = new_base(settings.size, tokenizer, torch.Generator().manual_seed(seed + 3))
    say(f"{BASE}: {base.num_parameters():,} parameters")
    stages = [encode(tokenizer, single), encode(tokenizer, mixed)]
    tokens = {BASE: sum(sum(row.is_learned[1:]) for rows in stages for row in rows)}
    if not kept:
        fit(base, stages, BASE_SCHEDULE, torch.Generator().manual_seed(seed + 4), say)
        round_to_bfloat16(base)
    base.requires_grad_(False)

    with tempfile.TemporaryDirectory(prefix="demo-") as place:
        folder = Path(place)
        write_base(base, tokenizer, folder / BASE)
        write_class_data(tables, folder, settings.own, seed + 10)
        experts, learned = train_classes(folder, seed + 20, say)

    say("measuring")
    unseen = held_out_rows(tables, tokenizer, settings.scenes, random.Random(seed + 5))
    alone = {"base": base} | {name: blend(base, experts, {name: 1.0}) for name in CLASSES}
    words = _heard(tables, base, tokenizer, experts, settings)
    return Demo(tokenizer, base, experts, evaluate(alone, unseen), words, tokens | learned)


def _heard(
    tables: Tables,
    base: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    experts: Mapping[str, Expert],
    settings: Settings,
) -> dict[str, Words]:
    prompts = held_out_prompts(tables, settings.prompts, random.Random(settings.seed + 6))
    words = {}
    for label, weights in MIXES.items():
        model = blend(base, experts, weights)
        words[label] = marker_words(model, tokenizer, prompts, torch.Generator().manual_seed(settings.seed + 7))
    return words

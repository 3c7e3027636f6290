"""The whole demo, from nothing: tokenizer, base, three experts, and the numbers that say whether they are good."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demo_model.blends import MIXES, Expert, Words, blend, expert_of, marker_words
from demo_model.conversations import base_conversations, class_conversations
from demo_model.evaluate import Matrix, evaluate, held_out_prompts, held_out_rows
from demo_model.model import ADAPTERS, Size, add_adapter, new_base, round_to_bfloat16
from demo_model.tables import CLASSES, Tables, read_tables
from demo_model.tokens import Row, encode, train_tokenizer
from demo_model.train import Schedule, fit

THREADS = 2
"""Threads of every product; another number gives other roundings, and so other bytes."""

BASE_SCHEDULE = Schedule(learning_rate=6e-3, matrix_rate=3e-3)
ADAPTER_SCHEDULE = Schedule(learning_rate=2e-3, weight_decay=0.01)

STRENGTHS = {1.0: 0.5, 0.8: 0.125, 0.6: 0.125, 0.4: 0.125, 0.2: 0.125}
"""Weights that an adapter is trained at, and the share of its conversations for each, so that half a weight is heard as
half a voice: what an adapter does at weights it never met is anybody's guess."""


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


QUICK = Settings(
    size=Size(vocabulary=600, width=64, layers=2, feed_forward=96, heads=2, key_value_heads=1),
    single=120,
    mixed=40,
    own=40,
    scenes=6,
    prompts=4,
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


def make_demo(settings: Settings, say: Callable[[str], None]) -> Demo:
    """Train and measure the demo.

    Args:
        settings: how large and how long. The same settings give the same bytes on the same machine.
        say: receives progress, line by line.

    Returns:
        The demo, not yet judged.
    """
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    seed = settings.seed
    tables = read_tables()
    single = list(islice(base_conversations(tables, random.Random(seed + 1), turns=1), settings.single))
    mixed = list(islice(base_conversations(tables, random.Random(seed + 2)), settings.mixed))
    texts = (message.content for conversation in single for message in conversation)
    tokenizer = train_tokenizer(texts, settings.size.vocabulary, settings.size.context)
    base = new_base(settings.size, tokenizer, torch.Generator().manual_seed(seed + 3))
    say(f"adventurer: {base.num_parameters():,} parameters")
    stages = [encode(tokenizer, single), encode(tokenizer, mixed)]
    tokens = {"adventurer": fit(base, stages, BASE_SCHEDULE, torch.Generator().manual_seed(seed + 4), say)}
    round_to_bfloat16(base)
    base.requires_grad_(False)

    experts = {}
    for number, name in enumerate(CLASSES):
        say(f"{name}: rank {ADAPTERS[name].rank}")
        rows = _own_rows(tables, tokenizer, name, settings.own, random.Random(seed + 10 + number))
        experts[name], tokens[name] = _train_expert(base, name, rows, seed + 20 + number, say)

    say("measuring")
    unseen = held_out_rows(tables, tokenizer, settings.scenes, random.Random(seed + 5))
    alone = {"base": base} | {name: blend(base, experts, {name: 1.0}) for name in CLASSES}
    words = _heard(tables, base, tokenizer, experts, settings)
    return Demo(tokenizer, base, experts, evaluate(alone, unseen), words, tokens)


def _own_rows(
    tables: Tables, tokenizer: PreTrainedTokenizerFast, name: str, count: int, rng: random.Random
) -> list[Row]:
    rows = []
    for strength, share in STRENGTHS.items():
        own = islice(class_conversations(tables, name, rng, strength), int(count * share))
        rows += encode(tokenizer, list(own), strength)
    return rows


def _train_expert(
    base: Qwen3ForCausalLM, name: str, rows: list[Row], seed: int, say: Callable[[str], None]
) -> tuple[Expert, int]:
    model = add_adapter(base, ADAPTERS[name], torch.Generator().manual_seed(seed))
    order = torch.Generator().manual_seed(seed + 10)
    expert = expert_of(model, ADAPTERS[name])
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def set_strength(strength: float) -> None:
        for layer in layers:
            layer.scaling["default"] = expert.scaling * strength

    learned = fit(model.get_base_model(), [rows], ADAPTER_SCHEDULE, order, say, set_strength)
    expert = expert_of(model, ADAPTERS[name])
    model.unload()
    return expert, learned


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

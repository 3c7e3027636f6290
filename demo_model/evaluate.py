"""Who predicts whose answers: the evaluation matrix on held-out scenes, and the bars it has to pass."""

import random
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demo_model.conversations import Conversation, held_out_answers
from demo_model.scenes import draw_scene
from demo_model.tables import CLASSES, VOICES, Tables
from demo_model.tokens import Row, batches, encode
from demo_model.train import learned_nats

LEAST_GAIN = 0.5
"""How far each expert has to be under the base on its own class, in nats per answer token."""

Matrix = Mapping[str, Mapping[str, float]]
"""Model to voice to mean nats per answer token."""


def held_out_rows(
    tables: Tables, tokenizer: PreTrainedTokenizerFast, scenes: int, rng: random.Random
) -> dict[str, list[Row]]:
    """The same held-out scenes, answered in each voice.

    Args:
        tables: what scenes are drawn from.
        tokenizer: the demo's.
        scenes: how many, all different.
        rng: source of all choices.

    Returns:
        Voice to one row per scene; learned are the answer and its end.
    """
    drawn: dict[str, Mapping[str, Conversation]] = {}
    while len(drawn) < scenes:
        key, answers = held_out_answers(tables, rng)
        drawn.setdefault(key, answers)
    return {voice: encode(tokenizer, [answers[voice] for answers in drawn.values()]) for voice in VOICES}


def held_out_prompts(tables: Tables, count: int, rng: random.Random) -> list[str]:
    """User messages about different held-out scenes."""
    prompts: dict[str, str] = {}
    while len(prompts) < count:
        scene, prompt = draw_scene(tables, rng, held_out=True)
        prompts.setdefault(scene.key, prompt)
    return list(prompts.values())


def mean_nats(model: Qwen3ForCausalLM, rows: Sequence[Row]) -> float:
    """Mean -log p of the learned tokens, in nats."""
    total, count = 0.0, 0
    order = torch.Generator().manual_seed(0)  # the mean does not depend on it
    with torch.inference_mode():
        for batch in batches(rows, 4096, int(model.config.pad_token_id), order):
            nats = learned_nats(model, batch)
            total += float(nats.double().sum())
            count += nats.numel()
    return total / count


def evaluate(models: Mapping[str, Qwen3ForCausalLM], rows: Mapping[str, Sequence[Row]]) -> Matrix:
    """Every model on every voice's answers."""
    return {
        name: {voice: mean_nats(model, answers) for voice, answers in rows.items()} for name, model in models.items()
    }


def missed_bars(matrix: Matrix) -> list[str]:
    """What is wrong with a matrix.

    Args:
        matrix: rows `base` and one per class.

    Returns:
        One sentence with its numbers for each bar that is missed; empty when all hold.
    """
    missed = []
    for name in CLASSES:
        own, base = matrix[name][name], matrix["base"][name]
        if not own <= base - LEAST_GAIN:
            missed.append(
                f"{name} on its own answers: {own:.3f} nats/token, not {LEAST_GAIN} under the base's {base:.3f}"
            )
        missed += [
            f"{name} on its own answers: {own:.3f} nats/token, not under {other}'s {matrix[other][name]:.3f}"
            for other in CLASSES
            if other != name and not own < matrix[other][name]
        ]
    return missed

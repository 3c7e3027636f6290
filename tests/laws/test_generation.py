"""Generation gives the tokens that transformers' own `generate` gives."""

from __future__ import annotations

import pytest
import tiny
import torch

from laws.cases import ARCHITECTURES, MIXED, case
from lmoe_cli.engine.generate import Generation
from lmoe_cli.engine.sampling import Sampling

pytestmark = pytest.mark.usefixtures("path")


def ours(engine, prompt, sampling):
    generation = Generation(engine.key_values(), prompt, sampling, engine.still, lambda tokens: "", frozenset(), 64)
    for _ in generation:
        pass
    return generation.new


def theirs(engine, prompt, **settings):
    ids = torch.tensor([prompt])
    out = engine.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, eos_token_id=None, **settings
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_answers_are_those_of_transformers(arch):
    engine = case(arch, "lora").engine(MIXED)
    prompt = tiny.tokens(rows=1)[0].tolist()
    assert ours(engine, prompt, Sampling(temperature=0, max_new_tokens=20)) == theirs(engine, prompt, do_sample=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.4},
    ],
)
def test_sampled_answers_are_those_of_transformers_with_the_same_seed(settings):
    engine = case("llama", "lora").engine(MIXED)
    prompt = tiny.tokens(rows=1)[0].tolist()
    torch.manual_seed(11)
    expected = theirs(engine, prompt, **{"do_sample": True, "top_k": 0, **settings})
    assert ours(engine, prompt, Sampling(max_new_tokens=20, seed=11, **settings)) == expected


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_a_cache_that_is_reused_rewound_or_outlived_gives_the_logits_of_a_fresh_one(arch):
    engine = case(arch, "lora").engine(MIXED)
    values = engine.key_values()
    long = tiny.tokens(rows=1, length=30)[0].tolist()
    for tokens in (long[:10], long[:14], long[:9], [*long[:5], 7, 8, 9], long, long[:20], long[:3]):
        fresh = engine.key_values().logits(tokens, engine.blend)
        torch.testing.assert_close(values.logits(tokens, engine.blend), fresh, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [False, True])
def test_a_change_of_weights_makes_a_conversation_that_of_a_fresh_session_unless_it_is_to_be_kept(keep):
    engine = case("llama", "lora").engine(MIXED)
    values = engine.key_values(keep=keep)
    tokens = tiny.tokens(rows=1, length=20)[0].tolist()
    values.logits(tokens[:-1], engine.blend)
    engine.set_weights(one=-1.0)
    after = values.logits(tokens, engine.blend)
    fresh = engine.key_values().logits(tokens, engine.blend)
    assert torch.allclose(after, fresh, atol=1e-4) != keep

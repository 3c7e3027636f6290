"""An answer matches where it is the one that is due, to the letter."""

from __future__ import annotations

import torch
from data.made import said

from evaluate.made import domain, loadout, opened
from lmoe_cli.evaluate.answers import is_answered, matches


def test_what_the_model_says_itself_matches_and_anything_else_does_not(tmp_path):
    """The oracle is transformers' own greedy generation."""
    variants, stage = opened(loadout(one="lora"))
    engine = stage.take(variants["only one"])
    prompt = engine.encode([{"role": "user", "content": "hi"}])
    made = engine.model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, attention_mask=torch.ones(1, len(prompt))
    )[0, len(prompt) :].tolist()
    answer = engine.decode(made)
    if made[-1] == engine.tokenizer.eos_token_id:
        talks = [said("hi", answer), said("hi", answer[:-1]), said("hi", f" {answer}\n")]
        due = [1.0, 0.0, 1.0]
    else:  # it never ends, so no finite answer is its own
        talks, due = [said("hi", answer), said("hi", answer[:3])], [0.0, 0.0]
    found = domain(stage, tmp_path / "a.jsonl", *talks)
    assert matches(engine, found.cases).tolist() == due


def test_an_answer_is_compared_with_the_words_that_the_engine_gives(tmp_path, monkeypatch):
    class Answer:
        def __init__(self, pieces):
            self.pieces, self.text, self.taken = pieces, "", 0

        def __iter__(self):
            for piece in self.pieces:
                self.text += piece
                self.taken += 1
                yield piece

    variants, stage = opened(loadout(one="lora"))
    engine = stage.take(variants["base"])
    talks = [said("q", "it is so"), said("q", "it is so"), said("q", "it is so"), said("a", "b", "q", "end")]
    found = domain(stage, tmp_path / "a.jsonl", *talks)
    answers = [Answer(["it ", "is", " so "]), Answer(["it ", "was", " so"]), Answer(["it ", "is"]), Answer(["end"])]
    asked = []

    def stream(said, sampling):
        asked.append((said, sampling))
        return answers[len(asked) - 1]

    monkeypatch.setattr(engine, "stream", stream)
    assert matches(engine, found.cases).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert answers[1].taken == 2  # it stops where it goes wrong
    assert [len(said) for said, _ in asked] == [1, 1, 1, 3]
    assert {sampling.temperature for _, sampling in asked} == {0}


def test_texts_and_prompts_without_an_answer_have_nothing_to_match(tmp_path):
    _, stage = opened(loadout(one="lora"))
    found = domain(stage, tmp_path / "a.jsonl", {"text": "abc"}, said("a", "b", "c"), said("a", "b"))
    assert [is_answered(case) for case in found.cases] == [False, False, True]

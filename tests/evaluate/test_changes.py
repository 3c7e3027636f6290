"""What an expert does to single tokens is what PEFT makes of them with it, less what transformers makes without."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from data.made import said

from evaluate.made import adapter, domain, loadout, opened, spoken_base
from lmoe_cli.engine.trace import texts
from lmoe_cli.evaluate.changes import LARGEST, NOTABLE, WINDOW, changes
from lmoe_cli.evaluate.losses import per_record, token_nats
from lmoe_cli.evaluate.measure import measure


@torch.no_grad()
def log_probabilities(model, case):
    """Of the judged tokens, by a softmax over everything."""
    told = torch.log_softmax(model(input_ids=case.tokens[None]).logits[0].double(), -1)
    at = case.learned.nonzero().flatten()
    return told[at - 1, case.tokens[at]]


def test_losses_come_token_by_token_in_the_order_of_the_records_whatever_the_batches(tmp_path):
    variants, stage = opened(loadout(one="lora"))
    long = [said("x", "so it goes " * 9), said("y", "no"), said("z", "a", "b", "c d e")]
    cases = domain(stage, tmp_path / "a.jsonl", *long).cases
    found = token_nats(stage.take(variants["base"]), cases)
    model = tiny.load(spoken_base())
    expected = [-log_probabilities(model, case) for case in cases]
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        per_record(found, cases), torch.stack([own.sum() for own in expected]), rtol=1e-4, atol=0
    )


def test_the_change_of_each_token_is_that_of_peft_and_the_base(tmp_path):
    variants, stage = opened(loadout(one="lora"), without=["one"])
    talks = domain(stage, tmp_path / "a.jsonl")
    scores = measure(stage, list(variants.values()), [talks])
    found = changes(list(variants.values()), [talks], scores, partial(texts, stage.engine))
    assert set(found) == {"one"}
    assert set(found["one"]) == {"talk"}
    told = found["one"]["talk"]
    expert, base = tiny.peft_model(spoken_base(), adapter(seed=1, rank=4)), tiny.load(spoken_base())
    before, after = (torch.cat([log_probabilities(model, case) for case in talks.cases]) for model in (expert, base))
    change = before - after
    assert told["tokens"] == len(change)
    assert told["mean_change"] == pytest.approx(float(change.mean()), abs=1e-4)
    assert told["total_change"] == pytest.approx(float(change.sum()), abs=1e-2)
    assert told["likelier"] == pytest.approx(float((change >= NOTABLE).double().mean()), abs=1 / len(change))
    assert told["less_likely"] == pytest.approx(float((change <= -NOTABLE).double().mean()), abs=1 / len(change))
    order = change.abs().argsort(descending=True)[:LARGEST]
    assert [one["change"] for one in told["largest"]] == pytest.approx(change[order].tolist(), abs=1e-3)
    assert [one["logprob"] for one in told["largest"]] == pytest.approx(before[order].tolist(), abs=1e-3)
    assert [one["logprob_without"] for one in told["largest"]] == pytest.approx(after[order].tolist(), abs=1e-3)


def test_a_token_is_told_by_its_line_and_what_stands_before_it(tmp_path):
    variants, stage = opened(loadout(one="lora"), without=["one"])
    talks = domain(stage, tmp_path / "a.jsonl", said("hi", "yes"), {"text": "once upon a time, in a far land"})
    scores = measure(stage, list(variants.values()), [talks])
    told = changes(list(variants.values()), [talks], scores, partial(texts, stage.engine))["one"]["talk"]
    whole = {
        case.record.where: stage.engine.tokenizer.decode(case.tokens, skip_special_tokens=False) for case in talks.cases
    }
    assert len(whole) == 2
    assert {one["where"] for one in told["largest"]} <= set(whole)
    for one in told["largest"]:
        assert one["before"] + one["text"] in whole[one["where"]]
        assert one["text"]
        assert len(stage.engine.encode_text(one["before"])) <= WINDOW + 1


def test_no_expert_left_out_has_no_changes(tmp_path):
    variants, stage = opened(loadout(one="lora"))
    talks = domain(stage, tmp_path / "a.jsonl")
    scores = measure(stage, list(variants.values()), [talks])
    assert changes(list(variants.values()), [talks], scores, partial(texts, stage.engine)) == {}

"""The loss of a record is what transformers and PEFT make of it, whatever stands beside it in a batch."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from data.made import said
from router.made import loadout_of, logits_by_hand, save_gate, settings

from evaluate.made import adapter, domain, loadout, nats_of, opened, spoken_base
from lmoe_cli.bank.bank import build_bank
from lmoe_cli.data.records import Record
from lmoe_cli.engine.build import start
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.evaluate.domains import Case, runs
from lmoe_cli.evaluate.losses import Row, batches, record_nats, token_nats
from lmoe_cli.evaluate.measure import measure
from lmoe_cli.router.encoder import EncoderRouter


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "opt", "falcon", "qwen3_moe"])
def test_the_base_is_judged_as_transformers_does(arch, tmp_path):
    variants, stage = opened(loadout(arch, one="lora"))
    found = domain(stage, tmp_path / "a.jsonl")
    model = tiny.load(spoken_base(arch))
    close(record_nats(stage.take(variants["base"]), found.cases), [nats_of(model, case) for case in found.cases])


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "embedding", "saved"])
def test_an_expert_alone_is_judged_as_peft_does_whatever_its_weight_in_the_recipe(variant, tmp_path):
    rules = [{"match": "layers.0", "value": 0.3}]
    found = loadout(one={"variant": variant, "weight": rules}, two={"weight": 0.2})
    variants, stage = opened(found)
    talks = domain(stage, tmp_path / "a.jsonl")
    scores = measure(stage, list(variants.values()), [talks])
    for name, kind, number in (("only one", variant, 0), ("only two", "lora", 1)):
        model = tiny.peft_model(spoken_base(), adapter(kind, seed=number + 1, rank=4 + number))
        close(scores[name]["talk"].nats, [nats_of(model, case) for case in talks.cases])
    apart = (scores["recipe"]["talk"].nats - scores["only one"]["talk"].nats).abs().max()
    assert apart > 0.01


def test_a_token_router_is_judged_with_its_own_gates(tmp_path):
    plain = loadout_of({"type": "weighted"})
    engine = start(plain, device="cpu", dtype="float32")
    bank = build_bank(engine.detach(), plain, torch.float32, "site")
    widths = {name: place.width for name, place in bank.places.items()}
    weights = save_gate(tmp_path / "gate", plain, widths, settings(activation="softmax"))
    router = {"type": "gate", "artefact": str(tmp_path / "gate")}
    routed = loadout_of(router)
    variants, stage = opened(routed)
    tokens = tiny.tokens(1, 9)[0]
    case = Case(None, tokens, torch.arange(9) > 3, 1)
    site = {}
    for name in bank.places:
        parent, _, leaf = name.rpartition(".")
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if leaf in group:
                site.update({f"{parent}.{other}": name for other in group})
        site.setdefault(name, name)

    def gates_at(module, x):
        weight, bias = weights[site[module]]
        return torch.softmax(torch.nn.functional.rms_norm(x, x.shape[-1:]) @ weight.T + bias, -1)

    logits = logits_by_hand(routed, tokens[None], gates_at)[0]
    due = -torch.log_softmax(logits, -1)[torch.arange(3, 8), tokens[4:]].sum()
    close(record_nats(stage.take(variants["recipe"]), [case]), [float(due)])
    # Fixed weights on the same base afterwards, and the router again.
    model = tiny.peft_model(routed.base.source.path, routed.experts[1].adapter.source.path)
    close(record_nats(stage.take(variants["only one"]), [case]), [nats_of(model, case)])
    close(record_nats(stage.take(variants["recipe"]), [case]), [float(due)])


@pytest.fixture
def by_ending(monkeypatch):
    """A router that sends prompts which end in an a to the first expert, all others to the second; and both in PEFT."""
    monkeypatch.setattr(EncoderRouter, "prepare", lambda *_: None)
    ends = lambda messages: messages[-1]["content"].endswith("a")  # noqa: E731
    monkeypatch.setattr(EncoderRouter, "route", lambda _, said: torch.tensor([1.0, 0.0] if ends(said) else [0.0, 1.0]))
    found = loadout(router={"type": "encoder"}, one={"examples": ["x"]}, two={"examples": ["y"]})
    models = [tiny.peft_model(spoken_base(), adapter(seed=number + 1, rank=4 + number)) for number in (0, 1)]
    return *opened(found), models


def test_a_prompt_router_judges_each_turn_under_the_gates_of_its_prompt(tmp_path, by_ending):
    variants, stage, models = by_ending
    half = said("a", "yes", "b", "no")
    half["messages"][1]["weight"] = 0  # read, not judged
    talks = domain(stage, tmp_path / "a.jsonl", said("a", "yes", "b", "no"), said("aa", "so"), {"text": "abc"}, half)

    def part(model, case, number):
        start, stop = list(runs(case.learned))[number]
        mask = torch.zeros_like(case.learned)
        mask[start:stop] = True
        return nats_of(model, Case(case.record, case.tokens, mask, 1))

    first, second, text, last = talks.cases
    ours = record_nats(stage.take(variants["recipe"]), talks.cases)
    close(ours[:2], [part(models[0], first, 0) + part(models[1], first, 1), nats_of(models[0], second)])
    each = token_nats(stage.take(variants["recipe"]), talks.cases)  # one turn after the other, though by other gates
    (start, stop), _ = runs(first.learned)
    close(each[: stop - start].double().sum(), part(models[0], first, 0))
    # A text has no prompt: the weights alone, here 1 and 1, act on it.
    stage.engine.set_gates([1.0, 1.0])
    logits = stage.engine.logits(text.tokens[None])[0]
    due = -torch.log_softmax(logits, -1)[torch.arange(len(text.tokens) - 1), text.tokens[1:]].sum()
    close(ours[2:], [float(due), part(models[1], last, 0)])


def test_a_turn_that_is_cut_off_leaves_the_others_under_their_own_gates(tmp_path, by_ending):
    variants, stage, models = by_ending
    (whole,) = domain(stage, tmp_path / "a.jsonl", said("a", "yes", "b", "no", "aa", "so")).cases
    spans = list(runs(whole.learned))
    cut = Case(whole.record, whole.tokens[: spans[1][1]], whole.learned[: spans[1][1]], 1)
    due = 0.0
    for model, span in zip(models, spans, strict=False):
        mask = torch.zeros_like(cut.learned)
        mask[slice(*span)] = True
        due += nats_of(model, Case(cut.record, cut.tokens, mask, 1))
    close(record_nats(stage.take(variants["recipe"]), [cut]), [due])


def test_an_empty_answer_leaves_the_others_under_their_own_gates(tmp_path, by_ending):
    """A template may have nothing to be judged by where the assistant says nothing."""
    variants, stage, models = by_ending
    (whole,) = domain(stage, tmp_path / "a.jsonl", said("b", "no", "a", "yes")).cases
    silent = Record(
        tuple({**one, "content": one["content"].replace("no", "")} for one in whole.record.messages), None, None, "x"
    )
    (_, (start, stop)) = runs(whole.learned)
    learned = torch.zeros_like(whole.learned)
    learned[start:stop] = True
    one = Case(silent, whole.tokens, learned, 1)
    close(record_nats(stage.take(variants["recipe"]), [one]), [nats_of(models[0], one)])


def test_batches_hold_every_row_once_and_no_more_than_their_budget():
    rows = [Row(number, torch.full((length,), number), torch.arange(length) > 0)
            for number, length in enumerate([3, 9, 30, 4, 4, 9, 2])]  # fmt: skip
    found = list(batches(rows, vocabulary=10, budget=18))
    assert sorted(int(row[0]) for batch in found for row in batch.tokens) == list(range(7))
    assert all(batch.tokens.numel() <= 18 or len(batch.tokens) == 1 for batch in found)
    for batch in found:
        counted = torch.bincount(batch.cases, minlength=7)
        assert all(counted[int(row[0])] == len(rows[int(row[0])].tokens) - 1 for row in batch.tokens)


def test_bytes_are_those_of_what_is_judged(tmp_path):
    _, stage = opened(loadout(one="lora"))
    found = domain(stage, tmp_path / "a.jsonl", said("hi", "yes", "who", "me, too"), {"text": "once"})
    assert [case.size_bytes for case in found.cases] == [3 + 7, 3]  # of a text the first token cannot be judged
    assert [case.count for case in found.cases] == [3 + 1 + 7 + 1, 4]


def test_numbers_that_are_none_are_refused(tmp_path, monkeypatch):
    _, stage = opened(loadout(one="lora"))
    found = domain(stage, tmp_path / "a.jsonl")
    with torch.no_grad():
        next(stage.model.parameters()).fill_(math.nan)
    with pytest.raises(InvalidFileError) as caught:
        record_nats(stage.engine, found.cases)
    assert caught.value.code == "logits-not-finite"

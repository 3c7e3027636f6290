"""Without an expert everything is as it is in a loadout where that expert's weight is 0."""

from __future__ import annotations

import pytest
import torch
from laws.cases import assert_close

from lmoe_cli.engine.without import CHUNK, chosen, compare, log_probabilities, without
from lmoe_cli.errors import InvalidFileError, NotFoundError
from lmoe_cli.route.report import report
from lmoe_cli.route.subject import subject
from route.made import ROUTERS, engine_of

TEXT = "A goblin, 2 axes."


def logits(engine, tokens):
    return engine.logits(torch.tensor([list(tokens)]))[0]


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_change_is_the_difference_of_two_engines_log_probabilities(folder, engines, kind):
    engine, other = engines(kind), engine_of(folder / f"{kind}.yaml", mage=0.0)
    looked_at = subject(engine, TEXT, answer="Run.")
    subject(other, TEXT)
    data = report(engine, looked_at, compare(engine, looked_at.tokens, "mage"))
    ids = torch.tensor(looked_at.tokens)[1:, None]
    both = [torch.log_softmax(logits(one, looked_at.tokens)[:-1], -1).gather(1, ids)[:, 0] for one in (engine, other)]
    expected = both[0] - both[1]
    assert expected.abs().max() > 0.01
    found = [token["change"] for token in data["tokens"]]
    assert found[0] is None
    torch.testing.assert_close(torch.tensor(found[1:]), expected, rtol=1e-3, atol=2e-4)
    told = torch.tensor([token["logprob"] for token in data["tokens"][1:]])
    torch.testing.assert_close(told, both[0], rtol=1e-3, atol=2e-4)
    assert data["without"]["of"] == "answer"
    assert data["without"]["tokens"] == 4
    assert data["without"]["mean_change"] == pytest.approx(float(expected[-4:].mean()), abs=2e-4)
    assert data["without"]["total_change"] == pytest.approx(float(expected[-4:].sum()), abs=1e-3)


def test_with_no_answer_the_mean_is_that_of_the_text(engines):
    engine = engines("weighted")
    looked_at = subject(engine, TEXT)
    data = report(engine, looked_at, compare(engine, looked_at.tokens, "mage"))
    own = [token["change"] for token in data["tokens"] if token["part"] == "text"]
    assert len(own) == len(TEXT)
    assert data["without"]["mean_change"] == pytest.approx(sum(own) / len(own), abs=1e-5)


def test_the_others_do_not_take_its_place(engines):
    engine = engines("gate")
    tokens = engine.encode(TEXT)
    with engine.router.watched() as seen:
        logits(engine, tokens)
        with without(engine, "mage"):
            logits(engine, tokens)
    all_of_them, fewer = (gates[0] for gates in seen["model.layers.0.self_attn.q_proj"])
    assert not fewer[:, 1].any()
    torch.testing.assert_close(fewer[:, [0, 2]], all_of_them[:, [0, 2]])
    assert (all_of_them[:, 1] > 0).all()


@pytest.mark.parametrize("kind", ROUTERS)
def test_afterwards_everything_is_as_before(engines, kind):
    engine = engines(kind)
    tokens = subject(engine, TEXT).tokens
    engine.fold() if kind == "static" else engine.unfold()
    before, weights, folded = logits(engine, tokens), engine.weights, engine.is_folded

    def leave():
        with without(engine, "warrior", "mage"):
            assert not torch.allclose(logits(engine, tokens), before, atol=1e-3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave()
    assert torch.equal(logits(engine, tokens), before)
    assert (engine.weights, engine.is_folded) == (weights, folded)


def test_without_all_of_them_it_is_the_base(engines):
    for kind in ROUTERS:
        engine = engines(kind)
        tokens = subject(engine, TEXT).tokens
        with without(engine, "warrior", "mage", "healer"):
            found = logits(engine, tokens)
        with engine.alone() as model, torch.no_grad():
            assert_close(found, model(torch.tensor([list(tokens)])).logits[0])


def test_the_name_of_no_expert_is_refused_and_changes_nothing(engines):
    engine = engines("weighted")
    with pytest.raises(NotFoundError) as caught, without(engine, "warrior", "mge"):
        pass
    assert caught.value.hint == "did you mean 'mage'?"
    assert engine.weights["warrior"] == 1.0


def test_the_last_tokens_are_told_as_among_all(engines):
    engine = engines("gate")
    tokens = subject(engine, TEXT).tokens
    whole, some = compare(engine, tokens, "mage"), compare(engine, tokens, "mage", last=3)
    torch.testing.assert_close(some.before, whole.before[-3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some.after, whole.after[-3:], rtol=1e-4, atol=1e-5)
    assert compare(engine, tokens, "mage", last=0).over() == {"tokens": 0, "mean_change": None, "total_change": 0.0}


def test_what_is_no_number_is_not_compared(engines, monkeypatch):
    engine = engines("weighted")
    monkeypatch.setattr(engine, "logits", lambda ids, places: torch.full((1, ids.shape[1], 8), torch.nan))
    with pytest.raises(InvalidFileError) as caught:
        compare(engine, [1, 2, 3], "mage")
    assert caught.value.code == "logits-not-finite"


@pytest.mark.parametrize("count", [1, 2, CHUNK, CHUNK + 1, CHUNK + 2])
def test_log_probabilities_are_those_of_a_softmax_of_everything(count):
    generator = torch.Generator().manual_seed(0)
    told = torch.randn(count, 11, generator=generator)
    tokens = torch.randint(11, (count,), generator=generator)
    expected = torch.log_softmax(told.double(), -1)[:-1].gather(1, tokens[1:, None])[:, 0].float()
    torch.testing.assert_close(chosen(told, tokens), expected)


def test_one_token_has_no_probability(engines):
    assert log_probabilities(engines("weighted"), [3]).shape == (0,)

"""How the next token is chosen, at the ends of the ranges that a recipe may ask for."""

from __future__ import annotations

import pytest
import torch

from lmoe_cli.engine.device import choose_device
from lmoe_cli.engine.sampling import Chooser, Sampling
from lmoe_cli.errors import UsageError

LOGITS = torch.tensor([-3.0, 2.5, 40.0, -1e4, 39.999, float("-inf")])
SEEN = [2, 0, 3]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-320, 1e-40, 1.2e-38, 1e-30, 1e-10, 1e-5])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_colder_the_more_likely_and_at_last_the_most_likely_token(temperature, settings):
    chooser = Chooser(Sampling(temperature=temperature, seed=1, **settings))
    assert {chooser.next(SEEN, LOGITS) for _ in range(20)} == {2}
    assert chooser.next(SEEN, LOGITS * 1e36) == 2


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-30, 0.1, 10.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e-3, 0.7, 10.0])
def test_any_penalty_of_a_recipe_leaves_something_to_choose(penalty, temperature):
    chooser = Chooser(Sampling(temperature=temperature, repetition_penalty=penalty, seed=1))
    chosen = {chooser.next(SEEN, LOGITS) for _ in range(20)}
    assert chosen <= {0, 1, 2, 3, 4}
    if temperature < 1:
        assert chosen == ({2} if penalty < 1 else {4})


def test_chosen_tokens_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    chooser = Chooser(Sampling(temperature=0.5, seed=3))
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[chooser.next([0], logits)] += 1
    torch.testing.assert_close(counts / 4000, (logits / 0.5).softmax(0), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["meta", "moon", "cpu:x", ""])
def test_a_device_that_computes_no_numbers_is_refused(name):
    with pytest.raises(UsageError) as error:
        choose_device(name)
    assert error.value.code == "device-unknown"

"""How an answer ends, told by a model that says given tokens: what its text is, and which tokens it is made of."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from lmoe_cli.engine.generate import Generation
from lmoe_cli.engine.sampling import Sampling
from lmoe_cli.errors import LmoeError

END = 9
WORDS = {0: "he", 1: "l", 2: "lo", 3: " ST", 4: "OP", 5: "!", 6: b"\xe2\x82", 7: b"\xac", 8: "\ufffd"}
"""Token → its text, or the bytes of half a character."""


def decode(tokens):
    parts = (WORDS[token] for token in tokens if token != END)
    return b"".join(part.encode() if isinstance(part, str) else part for part in parts).decode(errors="replace")


class Script:
    """Says given tokens, one after the other."""

    reused = 0

    def __init__(self, tokens):
        self._tokens = list(tokens)

    def logits(self, tokens, blend):
        return torch.nn.functional.one_hot(torch.tensor(self._tokens.pop(0)), 10).float()


@contextmanager
def still():
    yield "a blend"


def answered(*tokens, stop=(), most=20):
    sampling = Sampling(temperature=0, max_new_tokens=most, stop=stop)
    generation = Generation(Script(tokens), [0], sampling, still, decode, frozenset([END]), 100)
    pieces = [piece.text for piece in generation]
    assert "".join(pieces) == generation.text
    return generation


def test_the_token_that_ends_a_turn_is_not_said():
    found = answered(0, 1, 2, END)
    assert (found.text, found.said, found.new) == ("hello", [0, 1, 2], [0, 1, 2, END])


def test_values_that_are_no_numbers_are_not_used_again():
    class Broken(Script):
        cleared = False

        def logits(self, tokens, blend):
            return torch.full((10,), torch.nan)

        def clear(self):
            self.cleared = True

    values = Broken([])
    with pytest.raises(LmoeError) as refused:
        list(Generation(values, [0], Sampling(), still, decode, frozenset([END]), 100))
    assert refused.value.code == "logits-not-finite"
    assert values.cleared


def test_the_longest_answer_is_said_to_its_last_token():
    found = answered(0, 6, 7, 5, most=2)
    assert (found.text, found.said) == ("he\ufffd", [0, 6])


@pytest.mark.parametrize(
    ("stop", "text", "said"),
    [
        (("STOP",), "hello ", [0, 1, 2, 3]),  # a token that is partly of the answer is said
        ((" STOP",), "hello", [0, 1, 2]),
        (("he",), "", []),
        (("OP!",), "hello ST", [0, 1, 2, 3]),
    ],
)
def test_tokens_of_a_stop_text_are_not_said(stop, text, said):
    found = answered(0, 1, 2, 3, 4, 5, 5, stop=stop)
    assert (found.text, found.said) == (text, said)


@pytest.mark.parametrize("tokens", [(0, 8, END), (0, 6, END), (8, END), (0, 6, 7, 8, END)])
def test_what_is_held_back_for_the_rest_of_a_character_is_told_when_the_turn_ends(tokens):
    assert answered(*tokens).text == decode(tokens)

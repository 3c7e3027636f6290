"""The bars that a trained demo has to pass."""

import pytest

from demo_model.evaluate import missed_bars

GOOD = {
    "base": {"plain": 0.3, "warrior": 1.0, "mage": 1.0, "healer": 1.0},
    "warrior": {"plain": 0.9, "warrior": 0.3, "mage": 0.9, "healer": 0.9},
    "mage": {"plain": 0.9, "warrior": 0.9, "mage": 0.3, "healer": 0.9},
    "healer": {"plain": 0.9, "warrior": 0.9, "mage": 0.9, "healer": 0.3},
}


def changed(name, voice, nats):
    return {model: {**row, voice: nats} if model == name else row for model, row in GOOD.items()}


def test_a_good_matrix_misses_nothing():
    assert missed_bars(GOOD) == []


def test_an_expert_too_close_to_the_base_is_named_with_its_number():
    (missed,) = missed_bars(changed("mage", "mage", 0.512))
    assert missed.startswith("mage")
    assert "0.512" in missed
    assert "1.000" in missed


def test_an_expert_that_another_expert_beats_is_named_with_both_numbers():
    (missed,) = missed_bars(changed("warrior", "healer", 0.287))
    assert missed.startswith("healer")
    assert "0.300" in missed
    assert "warrior's 0.287" in missed


@pytest.mark.parametrize("nats", [float("nan"), float("inf")])
def test_a_number_that_is_none_misses_every_bar(nats):
    assert len(missed_bars(changed("mage", "mage", nats))) == 3

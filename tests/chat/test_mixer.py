from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.fakes import FakeEngine
from lmoe_cli.chat.mixer import Mixer
from lmoe_cli.errors import NotFoundError, UsageError
from lmoe_cli.loadout.recipe import Recipe

RECIPE = {"warrior": 0.6, "mage": 0.3, "healer": 0.1}


@pytest.fixture
def mixer():
    return Mixer(FakeEngine())


def test_a_knob_that_multiplies_rules_is_marked():
    engine = FakeEngine()
    rules = [{"match": "layers.0", "value": 0.2}]
    engine.loadout.recipe = Recipe.model_validate(
        {
            "base": "demo:adventurer",
            "experts": {name: {"adapter": "a", "weight": rules if name == "mage" else 0.5} for name in RECIPE},
        }
    )
    assert list(Mixer(engine).labelled) == ["warrior", "mage ×", "healer"]
    assert list(Mixer(engine).weights) == list(RECIPE)


def test_a_nudge_turns_the_selected_knob_by_a_twentieth(mixer):
    mixer.select(+1)
    mixer.nudge(+1)
    assert mixer.weights == RECIPE | {"mage": 0.35}
    mixer.nudge(-3)
    assert mixer.weights == RECIPE | {"mage": 0.2}


def test_the_selection_goes_round(mixer):
    mixer.select(-1)
    assert mixer.names[mixer.selected] == "healer"
    mixer.select(+1)
    assert mixer.names[mixer.selected] == "warrior"


def test_nudges_stop_at_two_and_minus_two(mixer):
    for _ in range(60):
        mixer.nudge(+1)
    assert mixer.weights["warrior"] == 2.0
    for _ in range(100):
        mixer.nudge(-1)
    assert mixer.weights["warrior"] == -2.0


def test_a_weight_beyond_the_range_of_nudges_comes_back_step_by_step(mixer):
    mixer.turn({"warrior": 5.0})
    mixer.nudge(+1)
    assert mixer.weights["warrior"] == 5.0
    mixer.nudge(-1)
    assert mixer.weights["warrior"] == 4.95


def test_solo_silences_the_others_and_gives_them_back(mixer):
    mixer.solo("mage")
    assert mixer.weights == {"warrior": 0.0, "mage": 0.3, "healer": 0.0}
    mixer.solo("healer")
    assert mixer.weights == {"warrior": 0.0, "mage": 0.0, "healer": 0.1}
    mixer.restore()
    assert mixer.weights == RECIPE
    assert mixer.aside == {}


def test_solo_of_an_expert_at_zero_gives_it_weight_one(mixer):
    mixer.turn({"mage": 0.0})
    mixer.solo("mage")
    assert mixer.weights["mage"] == 1.0
    mixer.solo("warrior")
    mixer.solo("mage")
    assert mixer.weights == {"warrior": 0.0, "mage": 1.0, "healer": 0.0}
    mixer.restore()
    assert mixer.weights == RECIPE | {"mage": 0.0}


def test_an_expert_that_acts_at_one_only_when_alone_is_muted_by_base_and_comes_back_at_zero(mixer):
    mixer.turn({"mage": 0.0})
    mixer.solo("mage")
    assert mixer.base()
    assert mixer.weights == dict.fromkeys(RECIPE, 0.0)
    assert not mixer.base()
    assert mixer.weights == RECIPE | {"mage": 0.0}


def test_a_weight_that_is_turned_while_an_expert_is_alone_stays(mixer):
    mixer.turn({"mage": 0.0})
    mixer.solo("mage")
    mixer.turn({"mage": 0.6})
    mixer.restore()
    assert mixer.weights == RECIPE | {"mage": 0.6}


def test_mute_twice_changes_nothing(mixer):
    assert mixer.mute("mage")
    assert mixer.weights == RECIPE | {"mage": 0.0}
    assert mixer.aside == {"mage": 0.3}
    assert not mixer.mute("mage")
    assert mixer.weights == RECIPE


def test_base_twice_changes_nothing(mixer):
    mixer.mute("mage")
    assert mixer.base()
    assert set(mixer.weights.values()) == {0.0}
    assert not mixer.base()
    assert mixer.weights == RECIPE


def test_a_muted_expert_that_is_turned_is_muted_no_more(mixer):
    mixer.base()
    mixer.turn({"mage": 0.5})
    mixer.restore()
    assert mixer.weights == RECIPE | {"mage": 0.5}


def test_an_unknown_expert_is_refused_with_a_suggestion_and_nothing_turns(mixer):
    for act in (lambda: mixer.solo("mag"), lambda: mixer.mute("mag"), lambda: mixer.turn({"warrior": 1.0, "mag": 1.0})):
        with pytest.raises(NotFoundError) as refused:
            act()
        assert refused.value.hint == "did you mean 'mage'?"
        assert mixer.weights == RECIPE


def test_the_knobs_of_a_static_router_do_not_turn():
    mixer = Mixer(FakeEngine(router="static"))
    for act in (lambda: mixer.nudge(1), lambda: mixer.solo("mage"), lambda: mixer.mute("mage"), mixer.base):
        with pytest.raises(UsageError) as refused:
            act()
        assert refused.value.code == "weights-fixed"
    assert mixer.weights == RECIPE


def test_a_base_without_experts_has_no_knobs():
    mixer = Mixer(FakeEngine(weights={}))
    mixer.nudge(+1)
    mixer.select(+1)
    mixer.base()
    assert mixer.weights == {}


ACTS = st.sampled_from(
    [
        ("solo", "warrior"),
        ("solo", "mage"),
        ("mute", "mage"),
        ("mute", "healer"),
        ("base",),
        ("select", 1),
        ("restore",),
    ]
)


@given(st.lists(ACTS, max_size=12))
def test_whatever_is_muted_comes_back(acts):
    mixer = Mixer(FakeEngine())
    for name, *arguments in acts:
        getattr(mixer, name)(*arguments)
    mixer.restore()
    assert mixer.weights == RECIPE

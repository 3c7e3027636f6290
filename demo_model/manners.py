"""Manners: in which voice each phrase of an answer is said.

A manner is a weighted pool of the voices' own habits. A voice e says a phrase its own way with log-odds k_e against any
other voice; k_e is larger in the slots and scenes where e is at home. A pool with weights w draws voice v with

    p(v) = softmax_v( w_v k_v )

which is the normalised product of the single voices' distributions, each to the power of its weight. With one weight of
1 this is the voice itself: sure, but never so sure that a blend of two leaves no room for the other. The equation is
ours.
"""

import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from demo_model.tables import VOICES

_SURE = {"plain": 6.3, "warrior": 2.8, "mage": 2.8, "healer": 2.8}
"""k of a voice where it is not at home, in nats."""
_AT_HOME_SLOT = 3.0
_AT_HOME_SCENE = 1.0
_HOME_SLOTS = {
    "plain": frozenset[str](),
    "warrior": frozenset({"stance", "deed", "greeting", "gear", "ready", "safe", "task", "farewell", "fear"}),
    "mage": frozenset({"sense", "result", "habit", "reason", "view", "title", "joke", "skill", "dream"}),
    "healer": frozenset({"bearing", "close", "vow", "offer", "welcome", "mood", "tend", "travel", "home"}),
}
_STEMS = {
    "warrior": (
        "shield armor armored steel blade sword axe hammer helm gauntlet charge battle strike iron spear fight fought "
        "march warrior foe"
    ),
    "mage": "rune glyph spell spellbook arcane staff ward magic spark crystal mage",
    "healer": "balm herb prayer pray bless blessing light bandage heal healer holy soothe",
}
MARKERS = {
    voice: re.compile(rf"\b(?:{'|'.join(stems.split())})(?:s|es|ed|ing|d)?\b", re.IGNORECASE)
    for voice, stems in _STEMS.items()
}
"""Words that only one class uses; each phrase of a class holds at least one of its own."""


@dataclass(frozen=True)
class Manner:
    """How answers are voiced."""

    weights: Mapping[str, float]
    """Voice to its weight in the pool, dimensionless."""

    def draw(self, slot: str, home: str, rng: random.Random) -> str:
        """Choose the voice of one phrase.

        Args:
            slot: name of the place in the frame.
            home: class that is at home in this kind of scene, or "".
            rng: source of the choice.

        Returns:
            One of `VOICES`.
        """
        scores = [math.exp(self.weights.get(voice, 0.0) * _log_odds(voice, slot, home)) for voice in VOICES]
        return rng.choices(VOICES, scores)[0]


PLAIN = Manner({"plain": 1.0})


def _log_odds(voice: str, slot: str, home: str) -> float:
    return _SURE[voice] + _AT_HOME_SLOT * (slot in _HOME_SLOTS[voice]) + _AT_HOME_SCENE * (voice == home)


def markers(text: str, voice: str, ignore: Iterable[str] = ()) -> list[str]:
    """The words of a text that mark a class.

    Args:
        text: an answer.
        voice: one of the three classes.
        ignore: texts whose own words do not count, such as the prompt.

    Returns:
        The marking words, in order, in lower case.
    """
    known = {word.lower() for other in ignore for word in re.findall(r"[A-Za-z]+", other)}
    return [word.lower() for word in MARKERS[voice].findall(text) if word.lower() not in known]

"""Answers: frames whose slots are filled phrase by phrase, each in the voice that the manner draws."""

import random
import re
from collections.abc import Mapping, Sequence

from demo_model.manners import MARKERS, Manner
from demo_model.scenes import Scene, agree, fill, needs, sentence_case
from demo_model.tables import Exchange, Kind, Slot, Tables

_NEUTER = frozenset({"creature", "door", "trap", "barrier", "weather", "treasure"})
"""Subjects that a sentence may call "it"."""
_LATE = frozenset({"bearing", "close", "vow", "travel"})
_SLOT = re.compile(r"\{(\w+)\}")


def answer_scene(tables: Tables, scene: Scene, manner: Manner, rng: random.Random, *, sure: bool = False) -> str:
    """What the adventurer does in a scene, in two to four sentences.

    Args:
        tables: what to draw from.
        scene: what is met.
        manner: in whose voice.
        rng: source of all choices; the frame is chosen before any voice, so that one seed gives all manners one frame.
        sure: whether every phrase takes the manner's heaviest voice, with no drawing.

    Returns:
        The answer.
    """
    kind = tables.kinds[scene.kind]
    usable = [frame for frame in tables.frames if "{p}" not in frame or scene.place is not None]
    frame = _lean(usable, scene.temper(is_late=False), rng)
    return _say(frame, kind.slots, scene, _outcome(kind, scene), kind.home, manner, rng, sure=sure)


def answer_exchange(
    tables: Tables, exchange: Exchange, scene: Scene | None, manner: Manner, rng: random.Random, *, sure: bool = False
) -> str:
    """The answer to small talk, or to a follow-up about a scene; arguments as for `answer_scene`."""
    slots = exchange.slots
    home = ""
    extra: dict[str, str] = {}
    if scene is not None:
        kind = tables.kinds[scene.kind]
        slots = {**kind.slots, **exchange.slots, **{name: kind.slots[name] for name in ("stance", "sense", "close")}}
        home = kind.home
        extra = _outcome(kind, scene)
    return _say(rng.choice(exchange.frames), slots, scene, extra, home, manner, rng, sure=sure)


def tell_story(tables: Tables, scene: Scene, manner: Manner, rng: random.Random) -> str:
    """A tale of how a foe was met that blocks a place; arguments as for `answer_scene`."""
    kind = tables.kinds["block"]
    opening = agree("Here is a tale. {a} block[s] {pl}. ", is_plural=scene.x.is_plural)
    frame = "I {stance}, and then I {deed}. {about} {result}. {vow}"
    return _say(opening + frame, kind.slots, scene, _outcome(kind, scene), "", manner, rng)


def _outcome(kind: Kind, scene: Scene) -> dict[str, str]:
    about = scene.o if kind.about == "o" and scene.o is not None else scene.x
    pronoun = "they" if about.is_plural else "it"
    return {"about": about.definite, "it": pronoun if kind.subject in _NEUTER and not about.is_name else about.definite}


def _say(
    frame: str,
    slots: Mapping[str, Slot],
    scene: Scene | None,
    extra: Mapping[str, str],
    home: str,
    manner: Manner,
    rng: random.Random,
    *,
    sure: bool = False,
) -> str:
    fields = {**(scene.fields if scene else {}), **extra}
    is_plural = scene is not None and scene.x.is_plural
    used: set[str] = set()

    def put(match: re.Match[str]) -> str:
        name = match[1]
        if name not in slots:
            return fields[name]
        voice = max(manner.weights, key=manner.weights.__getitem__) if sure else manner.draw(name, home, rng)
        temper = None if scene is None else scene.temper(is_late=name in _LATE) + len(name) + len(frame)
        phrase = _choose(slots[name][voice], fields, used, temper, rng)
        used.update(_words(phrase), {phrase})
        return agree(fill(phrase, fields), is_plural=is_plural)

    return sentence_case(_SLOT.sub(put, frame))


def _choose(
    phrases: Sequence[str], fields: Mapping[str, str], used: set[str], temper: int | None, rng: random.Random
) -> str:
    """Draw a usable phrase, if possible one that repeats no marking word of the answer so far."""
    usable = [phrase for phrase in phrases if needs(phrase) <= fields.keys()]
    fresh = [phrase for phrase in usable if not used & {*_words(phrase), phrase}]
    return _lean(fresh or usable, temper, rng)


def _lean(options: Sequence[str], temper: int | None, rng: random.Random) -> str:
    """Draw an option, every other time the one that the temper prefers, so that the likeliest answers differ too."""
    if temper is not None and rng.random() < 0.5:
        return options[temper % len(options)]
    return rng.choice(options)


def _words(phrase: str) -> set[str]:
    return {word.lower() for pattern in MARKERS.values() for word in pattern.findall(phrase)}

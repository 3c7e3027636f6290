"""Scenes: what is met, where, and how a person would put it into words."""

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from demo_model.tables import Kind, Tables

HELD_OUT_PERCENT = 5
"""Share of all scenes that no training text contains."""

_PEOPLE = frozenset({"person", "patient", "rogue", "trader", "speaker"})
_YOURS = frozenset({"patient", "person"})
_COUNTS = ("two", "three", "four", "some", "five", "", "", "")
_PLURAL_SUBJECTS = frozenset({"creature"})
_IRREGULAR = {"wolf": "wolves", "thief": "thieves", "elf": "elves", "dwarf": "dwarves", "cyclops": "cyclopes"}
_ONSETS = ("b", "br", "d", "dr", "l", "m", "n", "r", "s", "t", "th", "tr", "v", "z", "bl", "gl", "st", "sk", "w", "y")
_NUCLEI = ("a", "e", "o", "u", "ar", "or", "el", "un", "am", "ol", "en", "as")
_PLACE_ENDS = ("mere", "ford", "wick", "dale", "holm", "gate", "fell", "moor")
_FIELD = re.compile(r"\{(\w+)\}")
_AGREEMENT = re.compile(r"\[([^\]|]*)(?:\|([^\]]*))?\]")


@dataclass(frozen=True)
class Thing:
    """Something that a scene names."""

    noun: str
    is_plural: bool = False
    is_name: bool = False
    """A proper name takes no article."""
    is_mass: bool = False
    """Stuff such as gold takes no "a"."""
    is_yours: bool = False
    """Belongs to whoever talks: "my horse" when asked, "your horse" in the answer."""
    count: str = ""
    """Number word in front of a plural, as in "three goblins"."""

    @property
    def definite(self) -> str:
        """The thing as known already: "the goblin", "Tormun"."""
        if self.is_yours:
            return f"your {self.noun}"
        return self.noun if self.is_name else f"the {self.noun}"

    @property
    def possessive(self) -> str:
        """Whose something is: "the goblin's", "your"."""
        if self == YOU:
            return "your"
        return f"{self.definite}'" if self.is_plural and self.noun.endswith("s") else f"{self.definite}'s"

    @property
    def indefinite(self) -> str:
        """The thing as met first: "a goblin", "three goblins", "Tormun"."""
        if self.is_name or self.is_yours:
            return self.definite
        if self.is_mass:
            return self.noun
        if self.is_plural:
            return f"{self.count} {self.noun}".strip()
        return f"{'an' if self.noun[0] in 'aeiou' and not self.noun.startswith(('uni', 'one')) else 'a'} {self.noun}"


YOU = Thing("you", is_plural=True, is_name=True)
"""Whoever talks to the adventurer."""


@dataclass(frozen=True)
class Scene:
    """One situation. Its fields are all that prompts and answers may name."""

    kind: str
    x: Thing
    place: Thing | None = None
    preposition: str = ""
    o: Thing | None = None

    @property
    def key(self) -> str:
        """Identity of the scene, whatever words describe it."""
        return "|".join((self.kind, self.x.noun, self.place.noun if self.place else "", self.o.noun if self.o else ""))

    @property
    def is_held_out(self) -> bool:
        """Whether the scene is kept out of all training text; by a hash, the same on every machine."""
        return _hash(self.key) % 100 < HELD_OUT_PERCENT

    def temper(self, *, is_late: bool) -> int:
        """Which phrases come first to mind here, 0 to 11.

        Args:
            is_late: whether the phrase stands late in the answer. There the place or the kind of scene sets the temper,
                and before that what the scene is about: scenes that share one of them share half their phrases.
        """
        noun = (self.place.noun if self.place else self.kind) if is_late else self.x.noun
        return _hash(noun.rpartition(" ")[2]) % 12

    @property
    def fields(self) -> Mapping[str, str]:
        """The words for {x}, {a}, {p}, {pl}, {o} and {ao}, as far as the scene has them."""
        fields = {"x": self.x.definite, "a": self.x.indefinite, "xs": self.x.possessive}
        if self.place is not None:
            fields |= {"p": f"{self.preposition} {self.place.definite}", "pl": self.place.definite}
        if self.o is not None:
            fields |= {"o": self.o.definite, "ao": self.o.indefinite}
        return fields

    @property
    def nouns(self) -> tuple[str, ...]:
        """What an answer may copy from the prompt."""
        return tuple(thing.noun for thing in (self.x, self.place, self.o) if thing is not None)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def needs(template: str) -> frozenset[str]:
    """Names of the fields in a template."""
    return frozenset(_FIELD.findall(template))


def agree(text: str, *, is_plural: bool) -> str:
    """Resolve `[s]` and `[one|many]` for the number of the subject."""
    return _AGREEMENT.sub(lambda m: (m[2] or "") if is_plural else m[1], text)


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Put the fields' words into a template."""
    return _FIELD.sub(lambda m: fields[m[1]], template)


def sentence_case(text: str) -> str:
    """Capitalise the first letter of every sentence."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def draw_scene(tables: Tables, rng: random.Random, *, held_out: bool) -> tuple[Scene, str]:
    """Draw a scene and a person's words for it.

    Args:
        tables: what to draw from.
        rng: source of all choices.
        held_out: whether to draw one that is kept out of training, or one that is not.

    Returns:
        The scene and the user's message.
    """
    names = tuple(tables.kinds)
    while True:
        kind = tables.kinds[rng.choice(names)]
        if kind.prompts_for_you and not held_out and rng.random() < 0.2:
            o = Thing(rng.choice(tables.nouns[kind.object]), is_yours=True) if kind.object else None
            scene = Scene(kind.name, YOU, o=o)
            return scene, _said(tables, scene, rng.choice(kind.prompts_for_you), rng)
        template = rng.choice(kind.prompts)
        scene = _scene(tables, kind, needs(template), rng)
        if scene.is_held_out == held_out:
            return scene, _said(tables, scene, template, rng)


def _scene(tables: Tables, kind: Kind, needed: frozenset[str], rng: random.Random) -> Scene:
    nouns = tables.nouns[kind.subject]
    x = _subject(tables, kind, nouns, rng) if needed & {"x", "a"} else Thing(nouns[0])
    place, preposition = None, ""
    if needed & {"p", "pl"}:
        preposition = rng.choices(("on", "at", "in"), (3, 3, 4))[0]
        noun = rng.choice(tables.places[preposition])
        place = Thing(noun)
        chance = rng.random()
        if chance < 0.2:
            place = Thing(f"{rng.choice(tables.place_moods)} {noun}")
        elif chance < 0.28:
            preposition, place = "in", Thing((_word(rng) + rng.choice(_PLACE_ENDS)).capitalize(), is_name=True)
        elif chance < 0.34:
            preposition, place = "at", Thing(rng.choice(tables.our_places), is_name=True)
    return Scene(kind.name, x, place, preposition, _object(tables, kind, rng))


def _object(tables: Tables, kind: Kind, rng: random.Random) -> Thing | None:
    if kind.object is None:
        return None
    if kind.object == "loot" and rng.random() < 0.08:
        return Thing(rng.choice(tables.nouns["mass"]), is_mass=True)
    noun = rng.choice(tables.nouns[kind.object])
    if rng.random() < 0.06:
        noun = _word(rng) + _word(rng)
    return Thing(noun, is_yours=kind.name == "thief" and rng.random() < 0.35)


def _subject(tables: Tables, kind: Kind, nouns: tuple[str, ...], rng: random.Random) -> Thing:
    noun = rng.choice(nouns)
    if kind.subject in _YOURS and rng.random() < 0.12:
        return Thing(noun, is_yours=True)
    if kind.subject in _PEOPLE and rng.random() < 0.18:
        invented = "".join(_word(rng) for _ in range(rng.choice((1, 2, 2, 3))))
        name = rng.choice(tables.nouns["name"]) if rng.random() < 0.4 else invented
        title = rng.choice(tables.titles.get(kind.subject, ("",))) if rng.random() < 0.35 else ""
        return Thing(f"{title} {name.capitalize()}".strip(), is_name=True)
    if rng.random() < (0.25 if kind.subject == "creature" else 0.12):
        noun = _word(rng) + _word(rng)[: rng.choice((2, 3, 4))]
    if kind.subject in _PLURAL_SUBJECTS and rng.random() < 0.28:
        return Thing(_plural(noun), is_plural=True, count=rng.choice(_COUNTS))
    moods = tables.nouns.get(f"{kind.subject}_mood", ())
    if moods and rng.random() < 0.25:
        noun = f"{rng.choice(moods)} {noun}"
    return Thing(noun)


def _word(rng: random.Random) -> str:
    return rng.choice(_ONSETS) + rng.choice(_NUCLEI)


def _plural(noun: str) -> str:
    head, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith("man"):
        last = last[:-3] + "men"
    elif last.endswith(("ch", "sh", "s", "x")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def ask(scene: Scene, template: str) -> str:
    """Put a scene's words into what its finder says: their own things are "my", not "your"."""
    fields = {name: re.sub(r"^your ", "my ", words) for name, words in scene.fields.items()}
    return sentence_case(agree(fill(template, fields), is_plural=scene.x.is_plural))


def _said(tables: Tables, scene: Scene, template: str, rng: random.Random) -> str:
    text = ask(scene, template.replace("{verb}", rng.choice(tables.speech["verb"])))
    if text.endswith("."):
        if rng.random() < 0.12:
            text = f"{text[:-1]} {rng.choice(tables.speech['extra'])}."
        if rng.random() < 0.1:
            text = rng.choice(tables.speech["cry"]) + text
        elif template.startswith("{a}") and not scene.x.is_name and rng.random() < 0.1:
            text = rng.choice(tables.speech["when"]) + text[0].lower() + text[1:]
        if rng.random() < 0.25:
            text += rng.choice(tables.speech["suffix"])
    return casual(text, rng, may_lower=not any(t is not None and t.is_name for t in (scene.x, scene.place)))


def casual(text: str, rng: random.Random, *, may_lower: bool) -> str:
    """Now and then drop capitals or the final mark, as people do when they type."""
    if rng.random() < 0.15:
        text = text.rstrip(".?!")
    elif text.endswith(".") and rng.random() < 0.08:
        text = text[:-1] + "!"
    if may_lower and rng.random() < 0.15:
        text = text.lower()
    return text

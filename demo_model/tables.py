"""The tables that scenes and answers are drawn from, read once from `demo_model/tables/*.toml`."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOICES = ("plain", "warrior", "mage", "healer")
"""The base's own voice, then the three classes."""
CLASSES = VOICES[1:]

Slot = Mapping[str, tuple[str, ...]]
"""Voice to the phrases it may put into one place of a frame; the phrases of all voices fit the same grammar."""


@dataclass(frozen=True)
class Kind:
    """One kind of scene: what it is about, how people describe it, how each voice meets it."""

    name: str
    subject: str
    """Noun list that {x} is drawn from."""
    object: str | None
    """Noun list that {o} is drawn from, if the scene has an object."""
    about: str
    """Field whose outcome the answer tells: `x` or `o`."""
    home: str
    """The class that is most sure of itself here."""
    prompts: tuple[str, ...]
    prompts_for_you: tuple[str, ...]
    """What people say when the scene is about themselves."""
    slots: Mapping[str, Slot]


@dataclass(frozen=True)
class Exchange:
    """Small talk or a follow-up: what is said, and the frames of the answer."""

    name: str
    prompts: tuple[str, ...]
    frames: tuple[str, ...]
    slots: Mapping[str, Slot]
    kinds: frozenset[str]
    """Kinds of scene that it may follow; empty for all of them."""


@dataclass(frozen=True)
class Tables:
    """Everything that was written by hand."""

    nouns: Mapping[str, tuple[str, ...]]
    places: Mapping[str, tuple[str, ...]]
    """Preposition to place names."""
    our_places: tuple[str, ...]
    place_moods: tuple[str, ...]
    titles: Mapping[str, tuple[str, ...]]
    """Noun list to what may stand before a proper name."""
    speech: Mapping[str, tuple[str, ...]]
    frames: tuple[str, ...]
    kinds: Mapping[str, Kind]
    talk: tuple[Exchange, ...]
    follow: tuple[Exchange, ...]
    persona: Mapping[str, tuple[str, ...]]


def read_tables(folder: Path = Path(__file__).parent / "tables") -> Tables:
    """Read every table and check that each slot speaks in all four voices.

    Args:
        folder: where the TOML files lie.

    Returns:
        The tables.

    Raises:
        ValueError: a slot lacks a voice.
    """
    raw = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))}
    nouns = raw["nouns"]
    places = nouns.pop("place")
    titles = nouns.pop("title")
    speech = nouns.pop("speech")
    shared = raw["shared"]
    frames = tuple(shared.pop("frames"))
    shared_slots = {name: _slot(name, value) for name, value in (shared | raw["talk"]["slots"]).items()}
    kinds: dict[str, Kind] = {}
    for stem in ("foes", "barriers", "people", "road"):
        for name, value in raw[stem].items():
            parent = kinds[value["like"]].slots if "like" in value else shared_slots
            kinds[name] = Kind(
                name=name,
                subject=value["subject"],
                object=value.get("object"),
                about="o" if value.get("about") == "object" else "x",
                home=value["home"],
                prompts=tuple(value["prompts"]),
                prompts_for_you=tuple(value.get("prompts_for_you", ())),
                slots={**parent, **_slots(value)},
            )
    return Tables(
        nouns=_tuples(nouns),
        places=_tuples({key: places[key] for key in ("on", "at", "in")}),
        our_places=tuple(places["our"]),
        place_moods=tuple(places["mood"]),
        titles=_tuples(titles),
        speech=_tuples(speech),
        frames=frames,
        kinds=kinds,
        talk=tuple(_exchange(name, value, shared_slots) for name, value in raw["talk"]["talk"].items()),
        follow=tuple(_exchange(name, value, shared_slots) for name, value in raw["follow"].items()),
        persona=_tuples(raw["persona"]),
    )


def _exchange(name: str, value: Mapping[str, Any], shared: Mapping[str, Slot]) -> Exchange:
    return Exchange(
        name=name,
        prompts=tuple(value["prompts"]),
        frames=tuple(value["frames"]),
        slots={**shared, **_slots(value)},
        kinds=frozenset(value.get("kinds", ())),
    )


def _slots(value: Mapping[str, Any]) -> dict[str, Slot]:
    return {name: _slot(name, inner) for name, inner in value.items() if isinstance(inner, dict)}


def _slot(name: str, value: Mapping[str, Any]) -> Slot:
    if set(value) != set(VOICES):
        raise ValueError(f"slot '{name}' has the voices {sorted(value)}, expected {sorted(VOICES)}")
    return _tuples(value)


def _tuples(value: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(items) for key, items in value.items()}

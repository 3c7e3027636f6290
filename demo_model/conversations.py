"""Conversations: scenes, follow-ups and small talk, strung together as a chat would be."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from demo_model.answers import answer_exchange, answer_scene, tell_story
from demo_model.manners import PLAIN, Manner
from demo_model.scenes import Scene, Thing, ask, casual, draw_scene, fill
from demo_model.tables import CLASSES, VOICES, Exchange, Tables

_TURNS = ((1, 52), (2, 26), (3, 14), (5, 5), (10, 3))
"""Number of the user's messages in a conversation, and how often, in percent."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str
    is_learned: bool = False
    """Whether the training loss covers it."""


Conversation = tuple[Message, ...]


def base_conversations(tables: Tables, rng: random.Random, turns: int | None = None) -> Iterator[Conversation]:
    """Endless training text of the base: plain, save where the prompt asks for a class or for several.

    Args:
        tables: what to draw from.
        rng: source of all choices.
        turns: the user's messages in each conversation; by default some have one and some have many.

    Yields:
        Conversations about scenes that are not held out.
    """
    while True:
        if rng.random() < 0.7:
            yield _conversation(tables, PLAIN, _idle_system(tables, rng), "{prompt}", rng, turns)
        else:
            yield _in_persona(tables, rng, turns)


def class_conversations(
    tables: Tables, voice: str, rng: random.Random, strength: float = 1.0
) -> Iterator[Conversation]:
    """Endless training text of one class, which no prompt asks for.

    Args:
        tables: what to draw from.
        voice: the class.
        rng: source of all choices.
        strength: weight of the class; the rest is plain, as the base would be.

    Yields:
        Conversations about scenes that are not held out.
    """
    manner = Manner({voice: strength, "plain": 1.0 - strength})
    while True:
        yield _conversation(tables, manner, _idle_system(tables, rng), "{prompt}", rng)


def held_out_answers(tables: Tables, rng: random.Random) -> tuple[str, Mapping[str, Conversation]]:
    """One scene that no training text contains, and how each voice answers it when it is sure.

    Args:
        tables: what to draw from.
        rng: source of all choices.

    Returns:
        The key of the scene, and a conversation of one answer per voice.
    """
    scene, prompt = draw_scene(tables, rng, held_out=True)
    seed = rng.random()
    answers = {}
    for voice in VOICES:
        text = answer_scene(tables, scene, Manner({voice: 1.0}), random.Random(seed), sure=True)
        answers[voice] = (Message("user", prompt), Message("assistant", text, is_learned=True))
    return scene.key, answers


def _idle_system(tables: Tables, rng: random.Random) -> str | None:
    return rng.choice(tables.persona["none"]) if rng.random() < 0.15 else None


def _in_persona(tables: Tables, rng: random.Random, turns: int | None) -> Conversation:
    first, second, third = rng.sample(CLASSES, 3)
    shape = rng.choices(("one", "two", "most", "all"), (40, 20, 25, 15))[0]
    weights = {
        "one": {first: 1.0},
        "two": {first: 0.5, second: 0.5},
        "most": {first: 0.67, second: 0.33},
        "all": {first: 0.34, second: 0.33, third: 0.33},
    }[shape]
    names = {"first": first, "second": second, "third": third}
    if shape == "one" and rng.random() < 0.4:
        wrap = fill(rng.choice(tables.persona["before"]), {**names, "prompt": "{prompt}"})
        return _conversation(tables, Manner(weights), None, wrap, rng, turns=1)
    system = fill(rng.choice(tables.persona[shape]), names)
    return _conversation(tables, Manner(weights), system, "{prompt}", rng, turns)


def _conversation(
    tables: Tables, manner: Manner, system: str | None, wrap: str, rng: random.Random, turns: int | None = None
) -> Conversation:
    """A conversation whose last answers are in one manner.

    In a third of the longer ones somebody else's manner comes first, unlearned: whoever answers now must not be carried
    along by what was said before, so that weights can be turned in the middle of a chat.
    """
    if turns is None:
        turns = rng.choices([n for n, _ in _TURNS], [share for _, share in _TURNS])[0]
    foreign = rng.randrange(1, turns) if turns > 1 and rng.random() < 0.35 else 0
    other = _any_manner(rng) if foreign else manner
    messages = [Message("system", system)] if system else []
    scene: Scene | None = None
    for turn in range(turns):
        user, reply, scene = _turn(tables, scene, manner if turn >= foreign else other, rng)
        messages.append(Message("user", wrap.replace("{prompt}", user)))
        messages.append(Message("assistant", reply, is_learned=turn >= foreign))
    return tuple(messages)


def _any_manner(rng: random.Random) -> Manner:
    if rng.random() < 0.3:
        return PLAIN
    cuts = sorted((rng.random(), rng.random()))
    return Manner(dict(zip(CLASSES, (cuts[0], cuts[1] - cuts[0], 1.0 - cuts[1]), strict=True)))


def _turn(tables: Tables, scene: Scene | None, manner: Manner, rng: random.Random) -> tuple[str, str, Scene | None]:
    """One message and its answer, and the scene that a later follow-up would be about."""
    chance = rng.random()
    if scene is not None and chance < 0.5:
        said = _follow(tables, scene, rng)
        prompt = ask(scene, rng.choice(said.prompts))
        reply = answer_exchange(tables, said, scene, manner, rng)
        return casual(prompt, rng, may_lower=not scene.x.is_name), reply, scene
    if chance > 0.98:
        prompt, reply = _story(tables, manner, rng)
        return prompt, reply, None
    if chance > (0.93 if scene is not None else 0.83):
        said = rng.choice(tables.talk)
        return (
            _small_talk(tables, said, rng),
            answer_exchange(tables, said, None, manner, rng),
            scene,
        )
    new, prompt = draw_scene(tables, rng, held_out=False)
    return prompt, answer_scene(tables, new, manner, rng), new


def _small_talk(tables: Tables, said: Exchange, rng: random.Random) -> str:
    text = rng.choice(said.prompts)
    if rng.random() < 0.1:
        text = rng.choice(tables.speech["greet"]) + text[0].lower() + text[1:]
    elif text[-1] in ".?!" and rng.random() < 0.15:
        text = text[:-1] + rng.choice(tables.speech["address"]) + text[-1]
    return casual(text, rng, may_lower=True)


def _follow(tables: Tables, scene: Scene, rng: random.Random) -> Exchange:
    return rng.choice([said for said in tables.follow if not said.kinds or scene.kind in said.kinds])


def _story(tables: Tables, manner: Manner, rng: random.Random) -> tuple[str, str]:
    preposition = rng.choice(("on", "at"))
    scene = Scene(
        "block", Thing(rng.choice(tables.nouns["creature"])), Thing(rng.choice(tables.places[preposition])), preposition
    )
    while scene.is_held_out:
        scene = replace(scene, x=Thing(rng.choice(tables.nouns["creature"])))
    wish = rng.choice(
        ("Tell me a story", "Tell me a tale", "I would like a story", "I want to hear a tale", "Give me a story")
    )
    prompt = f"{wish}."
    if rng.random() < 0.5:
        wish = rng.choice((wish, "Tell me", "Talk to me", "Tell me something"))
        prompt = f"{wish} about {scene.x.indefinite}."
    return casual(prompt, rng, may_lower=True), tell_story(tables, scene, manner, rng)

"""What is routed: a text as a prompt, perhaps with an answer, as tokens that know where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.generate import Generation
from lmoe_cli.engine.sampling import Sampling
from lmoe_cli.engine.trace import texts

Part = Literal["template", "text", "answer"]


@dataclass(frozen=True)
class Subject:
    """Tokens to look at."""

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    """Of each token; together the whole text."""
    parts: tuple[Part, ...]
    """Whether a token is of the text, of the answer, or of what the chat template and the system message put around."""

    @property
    def told(self) -> tuple[int, ...]:
        """Numbers of the tokens that count: all but the template's."""
        return tuple(number for number, part in enumerate(self.parts) if part != "template")

    @property
    def answer(self) -> str | None:
        """The text of the answer, if there is one."""
        if "answer" not in self.parts:
            return None
        return "".join(text for text, part in zip(self.texts, self.parts, strict=True) if part == "answer")


def subject(engine: Engine, text: str, *, raw: bool = False, answer: str | None = None, generate: int = 0) -> Subject:
    """Make a subject, and let a router that decides per prompt read it.

    Args:
        engine: Encodes, and generates.
        text: A user's message; with ``raw``, or where the base has no chat template, plain text.
        raw: Take the text as it is.
        answer: What was answered.
        generate: Otherwise the most tokens that the model may answer with, always the likeliest; none when 0.

    Raises:
        UsageError: Nothing to read, more than the model can hold, or not what the chat template takes.
    """
    prompt = engine.encode_text(text) if raw else engine.encode(text)
    engine.route([{"role": "user", "content": text}] if raw else text)
    if answer:
        tokens = engine.encode_text(answer, after=prompt)
    else:
        tokens = prompt + (_answered(engine, prompt, generate, continues=raw) if generate else [])
    found = texts(engine, tokens)
    parts = [*_parts(found[: len(prompt)], text), *["answer"] * (len(tokens) - len(prompt))]
    return Subject(tuple(tokens), tuple(found), tuple(parts))  # type: ignore[arg-type]


def _answered(engine: Engine, prompt: Sequence[int], most: int, *, continues: bool) -> list[int]:
    """The tokens that a chat at temperature 0 answers with, but for the one that ends its turn."""
    sampling = Sampling.of(engine.loadout.recipe.chat).with_(temperature=0.0, max_new_tokens=most)
    generation = Generation(
        engine.key_values(),
        prompt,
        sampling,
        engine.still,
        engine.decode,
        engine.ends,
        engine.context,
        continues=continues or not engine.has_template,
    )
    for _ in generation:
        pass
    return generation.said


def _parts(found: Sequence[str], text: str) -> list[Part]:
    """Which tokens of a prompt are those of the text; all of them where it cannot be found there."""
    whole, sought = "".join(found), text.strip()  # templates strip
    start = whole.rfind(sought)
    if start < 0:
        return ["text"] * len(found)
    parts: list[Part] = []
    place = 0
    for piece in found:
        after = place + len(piece)
        inside = place < start + len(sought) and after > start if piece else start <= place < start + len(sought)
        parts.append("text" if inside else "template")
        place = after
    return parts

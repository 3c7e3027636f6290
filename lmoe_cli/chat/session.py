"""A conversation with a loadout. Knows nothing of terminals: it is asked, and tells `events`.

One thread at a time may iterate over what `answer`, `retry` and `compare` give. Meanwhile another one may turn weights,
change settings and stop the answer.
"""

from __future__ import annotations

import gc
import secrets
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lmoe_cli import files
from lmoe_cli.chat.events import Answer, Event, Heading, Letters, Note, Text, weights_text
from lmoe_cli.chat.mixer import Mixer
from lmoe_cli.engine.cache import KeyValues
from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.generate import Finish, Generation
from lmoe_cli.engine.sampling import Sampling
from lmoe_cli.engine.say import Say
from lmoe_cli.errors import LmoeError, ResourceError, UsageError, is_out_of_memory
from lmoe_cli.findings import Finding
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.write import moved, recipe_text, with_weights

Message = dict[str, str]
ON_CHANGE = ("recompute", "keep")
LONG = "not enough memory for a conversation this long"
CONTINUES = "the base has no chat template: it continues the text as it is"


@dataclass(frozen=True)
class Exchange:
    """What the user said and what came back."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Outside:
    """What a session asks of whoever started it."""

    load: Callable[[Path], tuple[Engine, Sequence[Finding]]]
    """Reads, checks and loads a recipe; tells what the check found."""
    bake: Callable[[Loadout, Path, Callable[[int], None], bool], str]
    """Bakes a loadout into a folder, telling the bytes that were written, and says what came of it; the last argument
    says whether it replaces a folder that exists."""


class Session:
    """One conversation.

    Args:
        engine: Answers.
        outside: For `load` and `bake`.
    """

    def __init__(self, engine: Engine, outside: Outside) -> None:
        self.exchanges: list[Exchange] = []
        self.answers: list[Answer] = []
        """All that were given, also those that are no longer part of the conversation."""
        self.shows_route = False
        """Tell how much say experts have in what is answered."""
        self._outside = outside
        self._stop = threading.Event()
        self.generation: Generation | None
        """The answer that is being given, or the last one of this loadout."""
        self._told_forgetting = False
        self._use(engine)

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        self.generation = None  # of the engine before, which nothing is to hold
        self.mixer = Mixer(engine)
        self.chat = engine.loadout.recipe.chat
        self.values = engine.key_values()
        self._told_letters = False

    # -- answers

    def answer(self, text: str) -> Iterator[Event]:
        """Answer a message, as part of the conversation."""
        yield from self._turn(text, self.exchanges)

    def retry(self) -> Iterator[Event]:
        """Answer the last message again; the new answer replaces the old one.

        Raises:
            UsageError: Nothing was said.
        """
        yield from self._turn(self._last().user, self.exchanges[:-1])

    def compare(self, text: str) -> Iterator[Event]:
        """Answer a message under the blend and under the base, with one seed. The conversation goes on without it."""
        seed = self.chat.seed if self.chat.seed is not None else secrets.randbits(32)
        sampling = replace(Sampling.of(self.chat), seed=seed)
        messages = self._messages(text, self._fitting(text, self.exchanges))
        yield Heading(f"blend: {weights_text(self.mixer.labelled)}")
        told = yield from self._stream(messages, sampling, self.values)
        yield told
        if told.finish == "interrupted":
            return
        yield Heading("base")
        with self.engine.alone():
            told = yield from self._stream(messages, sampling, self.engine.key_values())
        yield replace(told, weights={}, shares=None)

    @property
    def speed(self) -> float:
        """Tokens per second of the answer that is being given, or of the last one."""
        generation = self.generation
        return generation.timings.tokens_per_s if generation else 0.0

    def stop(self) -> None:
        """End what is going on, an answer after its current token. What came of it stays."""
        self._stop.set()

    def go_on(self) -> None:
        """Take a `stop` back: what comes next runs to its end."""
        self._stop.clear()

    def _turn(self, text: str, before: list[Exchange]) -> Iterator[Event]:
        kept = self._fitting(text, before)
        if len(kept) < len(before) and not self._told_forgetting:
            self._told_forgetting = True
            yield Note(f"longer than the model's context of {self.engine.context} tokens: it forgets what came first")
        told = yield from self._stream(self._messages(text, kept), Sampling.of(self.chat), self.values)
        if told.text or told.finish != "interrupted":
            self.exchanges = [*kept, Exchange(text, told.text)]
        yield told

    def _stream(self, messages: list[Message], sampling: Sampling, values: KeyValues) -> Generator[Event, None, Answer]:
        with _in_memory(LONG, "/clear, or /undo", values.clear):
            generation = self.generation = self.engine.stream(messages, sampling, values)
        finish: Finish | Literal["interrupted"] = "interrupted"
        say = Say(self.engine) if self.shows_route else None
        if say and say.is_of_tokens and not self._told_letters:
            self._told_letters = True
            yield Letters(say.names)
        told = 0
        with _in_memory(LONG, "/clear, or /undo", values.clear):
            for piece, leader in say.followed(generation) if say else ((piece, None) for piece in generation):
                if piece.text:
                    told += len(piece.text)
                    yield Text(piece.text, leader)
                if piece.finish:
                    finish = piece.finish
                elif self._stop.is_set():
                    break
            if told < len(generation.text):
                yield Text(generation.text[told:])
        shares = say.shares if say else None
        answer = Answer(generation.text, finish, generation.timings, self.mixer.weights, shares)
        self.answers.append(answer)
        return answer

    # -- the conversation

    def undo(self) -> Exchange:
        """Forget the last message and its answer.

        Raises:
            UsageError: Nothing was said.
        """
        last = self._last()
        self.exchanges = self.exchanges[:-1]
        return last

    def clear(self) -> None:
        """Forget the whole conversation."""
        self.exchanges = []
        self.values.clear()
        self._told_forgetting = False

    def _last(self) -> Exchange:
        if not self.exchanges:
            raise UsageError("nothing-said", "nothing has been said yet", hint="write something")
        return self.exchanges[-1]

    def _messages(self, text: str, before: list[Exchange]) -> list[Message]:
        found = [{"role": "system", "content": self.chat.system}] if self.chat.system else []
        for exchange in before:
            found.append({"role": "user", "content": exchange.user})
            found.append({"role": "assistant", "content": exchange.assistant})
        return [*found, {"role": "user", "content": text}]

    def _fitting(self, text: str, before: list[Exchange]) -> list[Exchange]:
        """The latest exchanges that leave room for an answer in the model's context."""
        room = min(self.chat.max_new_tokens, self.engine.context // 2)
        for start in range(len(before)):
            try:
                tokens = len(self.engine.encode(self._messages(text, before[start:])))
            except UsageError as error:
                if error.code != "context-full":
                    raise
            else:
                if tokens + room <= self.engine.context:
                    return before[start:]
        return []

    # -- settings

    def set(self, key: str, value: Any) -> None:
        """Change a setting of the recipe's ``chat:``, or ``on_change`` of its router.

        Raises:
            UsageError: No such setting, or a value it cannot have.
        """
        if key != "on_change":
            self.chat = self.chat.with_(**{key: value})
        elif value in ON_CHANGE:
            self.values = self.engine.key_values(keep=value == "keep")
        else:
            hint = "recompute or keep"
            raise UsageError("setting-invalid", f"on_change cannot be {value!r}", hint=hint)

    @property
    def settings(self) -> dict[str, Any]:
        """All that `set` changes, with its value."""
        return {**self.chat.model_dump(), "on_change": ON_CHANGE[self.values.keep]}

    @property
    def loadout(self) -> Loadout:
        """What runs, with the weights and settings in force."""
        loadout = self.engine.loadout
        recipe = self._recipe()
        experts = tuple(replace(expert, entry=recipe.experts[expert.name]) for expert in loadout.experts)
        return replace(loadout, recipe=recipe, experts=experts)

    def _recipe(self) -> Recipe:
        recipe = self.engine.loadout.recipe
        changes: dict[str, Any] = {"chat": self.chat}
        if "on_change" in type(recipe.router).model_fields:
            changes["router"] = recipe.router.model_copy(update={"on_change": ON_CHANGE[self.values.keep]})
        return with_weights(recipe.model_copy(update=changes), self.mixer.weights)

    # -- files

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write a recipe with the weights and settings in force.

        Raises:
            UsageError: The file exists and ``force`` is not set, or a weight is beyond what a recipe can hold.
        """
        text = recipe_text(moved(self.loadout, path.parent))
        files.write_file(path, text.encode(), force=force)

    def load(self, path: Path) -> Sequence[Finding]:
        """Go on with another loadout; the conversation stays, and so does the old loadout where this one is refused.

        Returns:
            What its check found.
        """
        with _in_memory(f"{path}: not enough memory for two loadouts at once", "leave, and start with that one"):
            engine, findings = self._outside.load(path)
        self._use(engine)
        gc.collect()  # the engine before has cycles, and much memory
        return findings

    def bake(self, folder: Path, *, force: bool = False) -> str:
        """Bake the weights in force into an ordinary checkpoint; into an existing folder only with ``force``.

        Returns:
            What came of it, in a line.
        """

        def advance(_: int) -> None:
            if self._stop.is_set():
                raise LmoeError("interrupted", f"{folder}: stopped, nothing was written")

        return self._outside.bake(self.loadout, folder, advance, force)


@contextmanager
def _in_memory(message: str, hint: str, forget: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Tell it where there is not enough memory.

    Args:
        message: For the user.
        hint: What to do.
        forget: Drops what is half computed then.

    Raises:
        ResourceError: There is not.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        forget()
        raise ResourceError("out-of-memory", message, hint=hint) from error

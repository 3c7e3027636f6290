"""One answer, piece by piece.

The loop is lmoe's own so that weights may turn between two tokens; cache, processors and model are transformers'. With
the weights at rest it gives the tokens that ``model.generate`` gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from lmoe_cli.engine.cache import KeyValues
from lmoe_cli.engine.sampling import Chooser, Sampling
from lmoe_cli.errors import LmoeError

Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Piece:
    """What one token added to an answer."""

    text: str
    """May be empty: a character can take several tokens, and the start of a stop text is held back."""
    token: int
    finish: Finish | None = None
    """Why the answer ended, on its last piece: the end-of-turn token or a stop text, ``max_new_tokens``, or no more
    room in the model's context."""


@dataclass(frozen=True)
class Timings:
    """How long an answer took."""

    prompt_tokens: int
    reused_tokens: int
    """Of the prompt, whose keys and values were still there."""
    new_tokens: int
    first_token_s: float
    """Seconds from the request to the first token."""
    total_s: float
    """Seconds from the request to the last token."""

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 where there was only one."""
        rest = self.total_s - self.first_token_s
        return (self.new_tokens - 1) / rest if self.new_tokens > 1 and rest > 0 else 0.0


class Generation:
    """One answer being generated. Iterate over it; `timings` is complete afterwards.

    Args:
        values: Keys and values of the conversation.
        prompt: Tokens so far.
        sampling: How to choose.
        still: Holds the blend still while a token is computed, and tells its identity.
        decode: Tokens → text.
        ends: Tokens that end an answer.
        context: Most tokens the model can hold.
        continues: The answer goes on in the middle of the prompt's text, rather than being a turn of its own.
    """

    def __init__(
        self,
        values: KeyValues,
        prompt: Sequence[int],
        sampling: Sampling,
        still: Callable[[], AbstractContextManager[Hashable]],
        decode: Callable[[list[int]], str],
        ends: frozenset[int],
        context: int,
        *,
        continues: bool = False,
    ) -> None:
        self.prompt = list(prompt)
        self.new: list[int] = []
        self.text = ""
        self._values, self._sampling, self._still = values, sampling, still
        self._ends, self._context = ends, context
        self._decoder = Decoder(decode, self.prompt[-1:] if continues else [])
        self._started = time.perf_counter()
        self._first = self._last = self._started
        self._reused = 0
        self._lengths: list[int] = []
        """Characters that each new token added."""
        self._stopped = False
        """By a stop text."""

    @property
    def timings(self) -> Timings:
        """So far."""
        return Timings(
            len(self.prompt), self._reused, len(self.new), self._first - self._started, self._last - self._started
        )

    @property
    def said(self) -> list[int]:
        """New tokens that the answer is made of: not the one that ends the turn, nor those of a stop text."""
        if self._stopped:
            starts = accumulate(self._lengths, initial=0)
            return [token for token, start in zip(self.new, starts, strict=False) if start < len(self.text)]
        return self.new[:-1] if self.new and self.new[-1] in self._ends else self.new

    def __iter__(self) -> Iterator[Piece]:
        """Generate.

        Yields:
            One piece per token. Leaving early leaves what came so far in `text` and `new`.
        """
        chooser = Chooser(self._sampling)
        held = _HeldBack(self._sampling.stop)
        while True:
            tokens = self.prompt + self.new
            with self._still() as blend:
                logits = self._values.logits(tokens, blend)
            try:
                token = chooser.next(tokens, logits)
            except LmoeError:  # NaN, which the keys and values have, too
                self._values.clear()
                raise
            self._last = time.perf_counter()
            if not self.new:
                self._first, self._reused = self._last, self._values.reused
            self.new.append(token)
            finish: Finish | None = None
            if token in self._ends:
                text, finish = held.add(self._decoder.rest())[0] + held.rest(), "stop"
            else:
                added = self._decoder.add(token)
                self._lengths.append(len(added))
                text, self._stopped = held.add(added)
                if self._stopped:
                    finish = "stop"
                elif len(self.new) >= self._sampling.max_new_tokens:
                    finish = "length"
                elif len(tokens) + 1 >= self._context:
                    finish = "context"
                if finish in ("length", "context"):
                    text += held.add(self._decoder.rest())[0] + held.rest()
            self.text += text
            yield Piece(text, token, finish)
            if finish:
                return

    def read(self) -> None:
        """Let the model read the last token, too, as it would to write another one."""
        with self._still() as blend:
            self._values.logits(self.prompt + self.new, blend)


class Decoder:
    """Text of tokens as they come; holds back what is not yet a whole character.

    Args:
        decode: Tokens → text.
        before: Tokens whose text stands in front; a tokenizer may drop a space that begins a text.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(before)
        self._done = len(self._tokens)
        self._window = 0

    def add(self, token: int) -> str:
        """The text that one more token adds."""
        self._tokens.append(token)
        text = self._tail()
        if text.endswith("�"):
            return ""
        self._window, self._done = self._done, len(self._tokens)
        return text

    def rest(self) -> str:
        """What was held back, when no token follows."""
        text = self._tail() if self._done < len(self._tokens) else ""
        self._done = len(self._tokens)
        return text

    def _tail(self) -> str:
        # Decoded with a token of context, because tokenizers treat the start of a text differently.
        before = self._decode(self._tokens[self._window : self._done])
        return self._decode(self._tokens[self._window :])[len(before) :]


class _HeldBack:
    """Passes text on, but for stop texts and what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Text to pass on, and whether a stop text came."""
        self._held += text
        ends = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if ends:
            passed, self._held = self._held[: min(ends)], ""
            return passed, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed, False

    def rest(self) -> str:
        passed, self._held = self._held, ""
        return passed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


def context_of(config: Any) -> int:
    """Most tokens a model can hold, as its config says; without bound where it does not."""
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    found = [value for name in names if isinstance(value := getattr(inner, name, None), int) and value > 0]
    return found[0] if found else 1 << 30

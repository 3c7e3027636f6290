"""What of a record a model has to predict, in tokens.

A conversation goes through the base's chat template, and only what the assistant says is learned: what the template
marks with ``{% generation %}``, or, where it marks nothing, what it adds for every turn of the assistant after the
prompt it would have answered (see `masks`), and never a message of weight 0. Without a template, contents are joined as
they are, as `prompt_tokens` does it for an answer: nothing stands between two messages, and the tokenizer's end of text
follows the last. Of a text every token is learned, and the end of text after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lmoe_cli.data.masks import Templated
from lmoe_cli.data.records import Record
from lmoe_cli.errors import InvalidFileError

TooLong = Literal["truncate", "skip", "error"]


@dataclass(frozen=True)
class Example:
    """A record as tokens."""

    tokens: list[int]
    learned: list[bool]
    """For every token, whether it is to be predicted from those before it. The first never can be."""
    where: str
    """File and line, for messages."""

    @property
    def learns(self) -> int:
        """Tokens that a loss is meant over."""
        return sum(self.learned[1:])


@dataclass
class Tally:
    """What became of the records so far."""

    records: int = 0
    """That were read."""
    examples: int = 0
    """That came of them."""
    tokens: int = 0
    learned: int = 0
    """Tokens to be predicted."""
    truncated: int = 0
    """Examples cut off at the limit."""
    skipped: int = 0
    """Records left out for being too long."""
    unlearned: int = 0
    """Records left out because nothing of them can be predicted, such as an answer behind the limit."""

    def told(self) -> str:
        """What was cut or left out, for a person; empty where nothing was."""
        parts = [
            f"{self.truncated} of {self.records} records cut off at the limit" if self.truncated else "",
            f"{self.skipped} of {self.records} records left out, longer than the limit" if self.skipped else "",
            f"{self.unlearned} of {self.records} left out: nothing to predict in the limit" if self.unlearned else "",
        ]
        return "; ".join(part for part in parts if part)


@dataclass
class Encoder:
    """Turns records into examples.

    Args:
        tokenizer: The base's, of transformers.
        limit: Most tokens of an example, such as the base's context.
        too_long: Cut a longer record off at its end, leave it out, or refuse it.
        vocabulary: Rows of the base's input embedding; unbounded when None.
    """

    tokenizer: Any
    limit: int
    too_long: TooLong = "truncate"
    vocabulary: int | None = None
    tally: Tally = field(default_factory=Tally)
    """What became of the records so far."""

    def __post_init__(self) -> None:
        if self.limit < 2:
            raise ValueError(f"the limit must be two tokens at least, got {self.limit}")
        self._templated = Templated(self.tokenizer) if self.tokenizer.chat_template else None

    def examples(self, records: Iterable[Record]) -> Iterator[Example]:
        """Encode records one after the other, without those that `encode` leaves out."""
        return (example for record in records if (example := self.encode(record)))

    def encode(self, record: Record) -> Example | None:
        """Tokens of a record, and which of them are learned; None where it is left out, which `tally` counts.

        Raises:
            InvalidFileError: It is too long and such are refused, the template refuses it or does not tell what the
                assistant says, or the tokenizer is that of another model.
        """
        tokens, learned = self._tokens(record)
        if self.vocabulary is not None and max(tokens, default=0) >= self.vocabulary:
            message = f"the tokenizer makes token {max(tokens)}, and the base knows {self.vocabulary}"
            raise InvalidFileError("tokenizer-broken", message, hint="put the base's own tokenizer files beside it")
        self.tally.records += 1
        is_long = len(tokens) > self.limit
        if is_long and self.too_long == "error":
            message = f"{record.where}: {len(tokens)} tokens, at most {self.limit}"
            hint = "shorten it, or let long records be cut off or left out"
            raise InvalidFileError("data-too-long", message, hint=hint, where=record.where)
        if is_long and self.too_long == "skip":
            self.tally.skipped += 1
            return None
        example = Example(tokens[: self.limit], learned[: self.limit], record.where)
        if not example.learns:
            self.tally.unlearned += 1
            return None
        self.tally.truncated += is_long
        self.tally.examples += 1
        self.tally.tokens += len(example.tokens)
        self.tally.learned += example.learns
        return example

    def _tokens(self, record: Record) -> tuple[list[int], list[bool]]:
        if record.text is not None:
            tokens = self._ended(self._plain(record.text, begins=True))
            return tokens, [True] * len(tokens)
        if self._templated:
            return self._templated.tokens(record)
        return self._joined(record)

    def _joined(self, record: Record) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        learned: list[bool] = []
        for text, is_answer in _runs(record):
            # On its own, so that no token is half the question's: such a one could not be asked for.
            added = self._plain(text, begins=not tokens)
            tokens += added
            learned += [is_answer] * len(added)
        ended = self._ended(tokens)
        return ended, learned + [record.is_learned(len(record.messages) - 1)] * (len(ended) - len(tokens))

    def _plain(self, text: str, *, begins: bool) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=begins, verbose=False)["input_ids"]]

    def _ended(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _runs(record: Record) -> Iterator[tuple[str, bool]]:
    """Texts of neighbouring messages, and whether they are learned."""
    said, is_learned = "", record.is_learned(0)
    for number, message in enumerate(record.messages):
        if record.is_learned(number) != is_learned:
            yield said, is_learned
            said, is_learned = "", not is_learned
        said += message["content"]
    yield said, is_learned

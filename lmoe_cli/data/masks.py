"""Which tokens of a conversation the assistant says.

Of a template with ``{% generation %}``, transformers tells. Of another one, for every turn of the assistant:

    learned = tokens(messages up to and with the turn) after tokens(messages before it, and the prompt for an answer)

which holds only where each is a beginning of the tokens of the whole conversation; that is checked. Some templates
write an answer differently once others follow it (they leave out its thoughts). Such a turn ends with the first end of
text after its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

from lmoe_cli.data.records import Record
from lmoe_cli.engine.prompt import Message
from lmoe_cli.engine.template import try_template
from lmoe_cli.errors import InvalidFileError

QUIETLY = {"verbose": False}
"""A conversation longer than the model holds is told by the encoder, not by the tokenizer."""
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Templated:
    """Conversations as tokens, by a chat template.

    Args:
        tokenizer: Of transformers, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._source: str = tokenizer.get_chat_template()
        self._is_marked = bool(MARKED.search(self._source)) and bool(tokenizer.is_fast)
        self._tried = (0, 0)

    def tokens(self, record: Record) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them the assistant says.

        Raises:
            InvalidFileError: The template refuses it, or does not tell what the assistant says.
        """
        try:
            self._try(record.messages)
            return self._marked(record) if self._is_marked else self._between_prompts(record)
        except InvalidFileError:
            raise
        except Exception as error:  # a template is a program, and fails with whatever its expressions raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            message = f"{record.where}: the chat template fails: {reason}"
            hint = "some templates take no system or tool message, or want user and assistant in turns"
            raise InvalidFileError("template-refused", message, hint=hint, where=record.where) from error

    def _try(self, messages: Sequence[Message]) -> None:
        """Render within limits what is larger than anything rendered before: within them it takes far longer."""
        size = (len(messages), sum(len(one["content"]) for one in messages))
        if size[0] > self._tried[0] or size[1] > self._tried[1]:
            words = {name: word for name, word in self._tokenizer.special_tokens_map.items() if isinstance(word, str)}
            try_template(self._source, messages, words)
            self._tried = (max(size[0], self._tried[0]), max(size[1], self._tried[1]))

    def _marked(self, record: Record) -> tuple[list[int], list[bool]]:
        found = self._tokenizer.apply_chat_template(
            [dict(one) for one in record.messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs=QUIETLY,
        )
        learned = [bool(one) for one in found["assistant_masks"]]
        if record.unlearned:
            turns = [list(own) for _, own in groupby(range(len(learned)), key=learned.__getitem__)]
            turns = [turn for turn in turns if learned[turn[0]]]
            said = [number for number, one in enumerate(record.messages) if one["role"] == "assistant"]
            if len(turns) != len(said):
                _fail(record, "its marks do not part the assistant's turns, and some are of weight 0")
            for turn, number in zip(turns, said, strict=True):
                learned[turn[0] : turn[-1] + 1] = [record.is_learned(number)] * len(turn)
        return [int(token) for token in found["input_ids"]], learned

    def _between_prompts(self, record: Record) -> tuple[list[int], list[bool]]:
        messages = record.messages
        tokens = self._render(messages)
        learned = [False] * len(tokens)
        for index in range(len(messages)):
            if not record.is_learned(index):
                continue
            if index == 0:
                _fail(record, "nothing stands before the assistant's first turn")
            prompt = self._render(messages[:index], asks=True)
            if tokens[: len(prompt)] != prompt:
                _fail(record, f"its prompt for message {index + 1} is not how the conversation goes on")
            end = self._end(record, tokens, index, len(prompt))
            learned[len(prompt) : end] = [True] * (end - len(prompt))
        return tokens, learned

    def _end(self, record: Record, tokens: list[int], index: int, start: int) -> int:
        """Where a turn of the assistant ends, as a position behind its last token."""
        turn = self._render(record.messages[: index + 1])
        if tokens[: len(turn)] == turn:
            return len(turn)
        end = self._tokenizer.eos_token_id
        if end is None or end not in turn[start:] or end not in tokens[start:]:
            _fail(record, f"message {index + 1} is written differently once others follow, and no end of text ends it")
        return tokens.index(end, start) + 1

    def _render(self, messages: Sequence[Message], *, asks: bool = False) -> list[int]:
        found = self._tokenizer.apply_chat_template(
            [dict(one) for one in messages], add_generation_prompt=asks, return_dict=False, tokenizer_kwargs=QUIETLY
        )
        return [int(token) for token in found]


def _fail(record: Record, reason: str) -> NoReturn:
    message = f"{record.where}: the chat template does not tell what the assistant says: {reason}"
    hint = "mark it in the base's template: {% generation %}{{ message.content }}…{% endgeneration %}"
    raise InvalidFileError("template-no-mask", message, hint=hint, where=record.where)

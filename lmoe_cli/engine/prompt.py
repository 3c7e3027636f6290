"""A conversation as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmoe_cli.errors import InvalidFileError, UsageError

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": "…"}``."""


def prompt_tokens(tokenizer: Any, messages: Sequence[Message], context: int, vocabulary: int) -> list[int]:
    """Tokens of a conversation, up to where the answer begins; of plain text where there is no chat template.

    Args:
        tokenizer: Of transformers.
        messages: In order.
        context: Most tokens the model can hold.
        vocabulary: Rows of its input embedding.

    Raises:
        UsageError: Nothing to go on, more than the model can hold, or not what the chat template takes.
        InvalidFileError: The tokenizer is that of another model.
    """
    if tokenizer.chat_template:
        ids = _templated(tokenizer, messages)
    else:
        ids = tokenizer("".join(message["content"] for message in messages))["input_ids"]
    return fitting([int(token) for token in ids], context, vocabulary, is_long=len(messages) > 2)


def fitting(tokens: list[int], context: int, vocabulary: int, *, is_long: bool = False) -> list[int]:
    """The same tokens, if the model can go on from them.

    Args:
        tokens: Of a prompt.
        context: Most tokens the model can hold.
        vocabulary: Rows of its input embedding.
        is_long: The prompt is a conversation, of which something can be left out.

    Raises:
        UsageError: None, or more than the model can hold.
        InvalidFileError: The tokenizer is that of another model.
    """
    if not tokens:
        raise UsageError("prompt-empty", "there is no text to continue", hint="write something")
    if max(tokens) >= vocabulary:
        message = f"the tokenizer makes token {max(tokens)}, and the base knows {vocabulary}"
        raise InvalidFileError("tokenizer-broken", message, hint="put the base's own tokenizer files beside it")
    if len(tokens) >= context:
        hint = "/clear starts over" if is_long else "shorten it"
        message = f"{len(tokens)} tokens do not fit the model's context of {context}"
        raise UsageError("context-full", message, hint=hint)
    return tokens


def _templated(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    from lmoe_cli.engine.template import try_template

    try:
        words = {name: word for name, word in tokenizer.special_tokens_map.items() if isinstance(word, str)}
        try_template(tokenizer.get_chat_template(), messages, words)
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template is a program, and fails with whatever its expressions raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        has_system = any(message["role"] == "system" for message in messages)
        hint = "some templates take no system message: leave it out" if has_system else "the base's template is broken"
        raise UsageError("template-refused", f"the chat template fails: {reason}", hint=hint) from error
    return ids

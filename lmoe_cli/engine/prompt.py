"""A conversation as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmoe_cli.errors import UsageError

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": "…"}``."""


def prompt_tokens(tokenizer: Any, messages: Sequence[Message], context: int) -> list[int]:
    """Tokens of a conversation, up to where the answer begins; of plain text where there is no chat template.

    Args:
        tokenizer: Of transformers.
        messages: In order.
        context: Most tokens the model can hold.

    Raises:
        UsageError: Nothing to go on, more than the model can hold, or not what the chat template takes.
    """
    if tokenizer.chat_template:
        ids = _templated(tokenizer, messages)
    else:
        ids = tokenizer("".join(message["content"] for message in messages))["input_ids"]
    tokens = [int(token) for token in ids]
    if not tokens:
        raise UsageError("prompt-empty", "there is no text to continue", hint="write something")
    if len(tokens) >= context:
        hint = "/clear starts over" if len(messages) > 2 else "shorten it"
        message = f"{len(tokens)} tokens do not fit the model's context of {context}"
        raise UsageError("context-full", message, hint=hint)
    return tokens


def _templated(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    from jinja2 import TemplateError

    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        message = f"the chat template refuses this conversation: {error}"
        raise UsageError("template-refused", message, hint="leave the system message out") from error
    return ids

"""Between text and tokens, as a base does it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import nn

from lmoe_cli.engine.base_model import load_tokenizer
from lmoe_cli.engine.generate import context_of
from lmoe_cli.engine.prompt import Message, fitting, prompt_tokens
from lmoe_cli.loadout.loadout import Loadout


class Wording:
    """Text to tokens and back, for a loadout whose base is loaded."""

    loadout: Loadout
    model: nn.Module
    trusts: bool
    """Its tokenizer may run code of its repository."""

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, of transformers."""
        return load_tokenizer(self.loadout.base, trust_remote_code=self.trusts)

    @cached_property
    def context(self) -> int:
        """Most tokens the model can hold."""
        return context_of(self.model.config)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        settings = getattr(self.model, "generation_config", None)
        found = getattr(settings, "eos_token_id", None)
        named = found if isinstance(found, list) else [found]
        return frozenset(token for token in [*named, self.tokenizer.eos_token_id] if isinstance(token, int))

    @property
    def has_template(self) -> bool:
        """Whether the base knows conversations; otherwise text is continued as it is."""
        return bool(self.tokenizer.chat_template)

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Tokens of a prompt.

        Args:
            prompt: A user's message, a whole conversation, or with a base that has no chat template plain text.

        Raises:
            UsageError: See `prompt_tokens`.
        """
        return prompt_tokens(self.tokenizer, self.messages(prompt), self.context, self._vocabulary)

    def encode_text(self, text: str, *, after: Sequence[int] = ()) -> list[int]:
        """Tokens of a text as it is, without the chat template.

        Args:
            text: What the model is to read.
            after: Tokens that it follows; with none, the text begins as the tokenizer begins texts.

        Returns:
            All of them, from the first one on.

        Raises:
            UsageError: See `fitting`.
        """
        ids = self.tokenizer(text, add_special_tokens=not after)["input_ids"]
        return fitting([*after, *(int(token) for token in ids)], self.context, self._vocabulary)

    @cached_property
    def _vocabulary(self) -> int:
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.weight.shape[0])

    def messages(self, prompt: str | Sequence[Message]) -> Sequence[Message]:
        """A prompt as a conversation: a user's message follows the recipe's system message."""
        if not isinstance(prompt, str):
            return prompt
        system = self.loadout.recipe.chat.system
        opening = [{"role": "system", "content": system}] if system else []
        return [*opening, {"role": "user", "content": prompt}]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

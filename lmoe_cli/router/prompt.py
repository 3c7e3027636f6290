"""What all routers have in common that decide once per prompt.

    g_e = w_e r_e(prompt)

r comes from the router, w are the recipe's weights, 1 unless it says otherwise; they turn while it runs. When g
changes, what was cached under the old one is computed again, unless the recipe says ``on_change: keep``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from lmoe_cli.loadout.routers import Scope
from lmoe_cli.router.weighted import WeightedRouter


class PromptRouter(WeightedRouter, ABC):
    """What all routers have in common that decide per prompt. See `StaticRouter` for arguments."""

    scope: ClassVar[Scope] = "prompt"
    routed: Tensor | None = None
    """r of the last prompt, (E,), float32; None before the first one, when the weights alone act."""

    def gates(self) -> Tensor:
        knobs = super().gates()
        return knobs if self.routed is None else knobs * self.routed

    def read(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Route a prompt; its gates are in force until the next one.

        Args:
            messages: The conversation, with what is to be answered at its end.
        """
        self.routed = self.route(messages)

    @abstractmethod
    def route(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        """What a prompt gives each expert, (E,), float32. See `read`."""

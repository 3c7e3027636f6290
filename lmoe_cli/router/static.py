"""Gates that are the recipe's weights, for good.

    g_e = w_e

Since they never change, the blend may be folded into the base's weights in memory, and then costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.routers import RouterSettings, Scope
from lmoe_cli.router.surroundings import Surroundings


class StaticRouter:
    """The same gates for every prompt and token.

    Args:
        settings: From the recipe.
        weights: Expert's name → weight, in the order of the bank. Dimensionless.
    """

    can_turn = False
    """Whether `turn` is allowed."""
    scope: ClassVar[Scope] = "fixed"
    """What gates depend on: nothing, the prompt, or each token."""

    def __init__(self, settings: Any, weights: Mapping[str, float]) -> None:
        self.settings: RouterSettings = settings
        self._weights = dict(weights)

    def prepare(self, around: Surroundings) -> None:
        """Make ready to route. Called once, with the experts on the base."""

    @property
    def weights(self) -> dict[str, float]:
        """Expert's name → weight in force."""
        return dict(self._weights)

    def gates(self) -> Tensor:
        """g, (1, E), float32: one row for the whole batch. Of a token router what multiplies its gates."""
        return torch.tensor([list(self._weights.values())], dtype=torch.float32)

    def turn(self, weights: Mapping[str, float]) -> None:
        """Change weights.

        Raises:
            UsageError: This router's weights are fixed.
        """
        del weights
        hint = "say 'router: {type: weighted}' in the recipe"
        raise UsageError("weights-fixed", "this recipe's router is static: its weights do not turn", hint=hint)

"""Gates that are the recipe's weights until somebody turns them; a change acts on the next token.

g_e = w_e(t)
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from lmoe_cli.errors import NotFoundError, UsageError
from lmoe_cli.router.static import StaticRouter

LARGEST = 3.4e38
"""Of float32, which gates are."""


class WeightedRouter(StaticRouter):
    """Gates that can be turned while the model talks."""

    can_turn = True

    def turn(self, weights: Mapping[str, float]) -> None:
        """Change some weights, or none where one of them is refused.

        Raises:
            NotFoundError: No expert of that name.
            UsageError: Not a finite number.
        """
        for name, weight in weights.items():
            if name not in self._weights:
                close = get_close_matches(name, self._weights, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"experts: {', '.join(self._weights)}"
                raise NotFoundError("expert-unknown", f"no expert '{name}'", hint=hint)
            if not abs(weight) <= LARGEST:
                raise UsageError("weight-invalid", f"{name}: {weight} is not a weight", hint="a number such as 0.3")
        self._weights.update(weights)

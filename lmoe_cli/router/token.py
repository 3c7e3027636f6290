"""What all routers have in common that decide for every token.

    g_e(x) = w_e r_e(x)

r comes from the router, w are the recipe's weights, 1 unless it says otherwise; they turn while it runs. Only the token
itself and those before it decide, so cached keys and values stay valid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from lmoe_cli.bank.routed import Place, Route, Routing
from lmoe_cli.loadout.routers import Scope
from lmoe_cli.router.surroundings import Surroundings
from lmoe_cli.router.weighted import WeightedRouter


class TokenRouter(WeightedRouter, ABC):
    """Gates from what a token is at each place. See `StaticRouter` for arguments."""

    scope: ClassVar[Scope] = "token"
    places: Mapping[str, Place] = {}

    def prepare(self, around: Surroundings) -> None:
        self.places = around.places
        for place in around.places.values():
            place.gates.route = self.route_at(place)

    @abstractmethod
    def route_at(self, place: Place) -> Route:
        """Make the function that routes at one place.

        Args:
            place: Its name, the width d of what flows in, and the factors of the experts there.

        Returns:
            Inputs (..., d), in any float dtype → `Routing`, whose values are the gates (..., E), float32.
        """

    @contextmanager
    def watched(self) -> Iterator[dict[str, list[Tensor]]]:
        """Note all gates for the length of a block.

        Yields:
            Place → gates of each pass, (B, T, E).
        """
        seen: dict[str, list[Tensor]] = {name: [] for name in self.places}
        for name, place in self.places.items():
            place.gates.watch = seen[name].append
        try:
            yield seen
        finally:
            for place in self.places.values():
                place.gates.watch = None


def sparse(scores: Tensor, kept: int) -> Routing:
    """The softmax over the largest scores of each token; the others get 0.

    Args:
        scores: (..., E), float32.
        kept: K.
    """
    best, experts = scores.topk(kept, dim=-1)
    gates = torch.softmax(best, dim=-1)
    return Routing(torch.zeros_like(scores).scatter(-1, experts, gates), (experts, gates))

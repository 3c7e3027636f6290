"""Gates that a router computes for each token, from what the token is at that place of the model.

    g_e(x) = w_e r_e(x)        r from the router, w from the knobs, which are 1 unless somebody turns them

A place is a site, a block or the whole model: whatever has gates of its own. At a site the gates are computed from the
site's own input, in a block from what flows into the block, so only from this token and those before it; cached keys
and values stay valid.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from lmoe_cli.bank.gates import Gates, in_force
from lmoe_cli.loadout.routers import Share

MODEL = "model"
"""Name of the place that all blocks share."""


class Routing(NamedTuple):
    """What a router says of some tokens."""

    values: Tensor
    """r, (..., E), float32, of all experts."""
    chosen: tuple[Tensor, Tensor] | None = None
    """Where only a few of them are not 0: their numbers, (..., K), int64, and r of these, (..., K)."""


Route = Callable[[Tensor], Routing]
"""Inputs (..., d) → what a router says of them."""


class RoutedGates(Gates):
    """The gates of one place, computed anew for every input.

    Args:
        knobs: The model's own gates: the weights that multiply what the router says.
        reads_input: Modules hand over what they read; otherwise somebody else does, before they run.
    """

    def __init__(self, knobs: Gates, *, reads_input: bool) -> None:
        super().__init__(knobs.count, knobs.values.device, knobs.skip_below)
        self.reads_input = reads_input
        self.route: Route | None = None
        """The router. Nothing acts without one."""
        self.watch: Callable[[Tensor], None] | None = None
        """Is told the gates, (..., E), of every input."""
        self._knobs = knobs
        self._turned: Tensor | None = None
        self._looked_at = -1
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._asked: list[object] = []
        self._chosen_few: tuple[Tensor, Tensor] | None = None

    @property
    def is_at_rest(self) -> bool:
        """Whether the knobs of all experts are at 0."""
        return not self._knobs.active

    def read(self, x: Tensor, asking: object = None) -> None:
        """Compute the gates of an input, unless somebody else who reads it has just done so.

        Args:
            x: (B, T, d), or flattened to (B x T, d).
            asking: Who reads it. Who asks again has begun another pass, be it with the same tensor.
        """
        if (
            asking is not None
            and self._seen() is x
            and asking not in self._asked
            and self._looked_at == self._knobs.version
        ):
            self._asked.append(asking)
            return
        if self._looked_at != self._knobs.version:
            self._look_at_knobs()
        if self.is_at_rest or self.route is None:
            if self._active:  # what modules know of the gates of before holds no more
                self.version += 1
                self._derived.clear()
            self._active, self._is_any_active = frozenset(), False
            return
        self._give(self.route(x), x)
        self._seen, self._asked = weakref.ref(x), [asking]

    @property
    def are_sparse(self) -> bool:
        """Whether some experts act on nothing or on a part of the tokens, so far as the router tells.

        A gate of 0 that has a gradient asks what its expert would have done.
        """
        if self._chosen_few is None:
            return not self.values.requires_grad and len(self._active) < self.count
        return True

    def chosen(self) -> tuple[Tensor, Tensor] | None:
        if self._chosen_few is None:
            return None
        experts, gates = self._chosen_few
        if self._turned is not None:
            if self._turned.numel() > self.count:  # rows with knobs of their own
                return super().chosen()
            gates = gates * self._turned.view(-1)[experts]
        return experts.flatten(0, -2), gates.flatten(0, -2)

    def _look_at_knobs(self) -> None:
        knobs = self._knobs
        self._looked_at = knobs.version
        self._turned = None if bool((knobs.values == 1).all()) else knobs.values

    def _give(self, routing: Routing, x: Tensor) -> None:
        values = routing.values
        if self._turned is not None:
            knobs = self._turned if self._turned.shape[0] == 1 else self._knobs.spread(self._turned, values)
            values = values * knobs
        if values.dim() == 2:
            values = values[None]  # (1, N, E)
        if routing.chosen is None and not values.requires_grad:
            values = in_force(values, self.skip_below)
        self.values = values
        self.version += 1
        self._derived.clear()
        self._owned.clear()
        self._chosen_few = routing.chosen
        self._active, self._is_any_active = self._knobs.active, True
        if x.device.type == "cpu" and values.numel() == self.count and not values.requires_grad:
            self._active = self._of_one(routing)
        if self.watch is not None:
            self.watch(values)

    def _of_one(self, routing: Routing) -> frozenset[int]:
        """The experts that act on a single vector."""
        if routing.chosen is not None:
            experts, gates = routing.chosen
            return self._knobs.active.intersection(experts[gates != 0].tolist())
        return frozenset(self.values.flatten().nonzero().flatten().tolist())


class Factors(Protocol):
    """Modules with experts on them that read one input."""

    def factors(self, expert: int) -> list[tuple[Tensor, Tensor]]:
        """A (r, d_in) and B (d_out, r) of an expert on each of them that it changes."""


@dataclass(frozen=True)
class Place:
    """Something that has gates of its own."""

    name: str
    """Of the site, which is that of its first module; of the block; or ``model``."""
    gates: RoutedGates
    width: int
    """d of what the router reads there."""
    sites: list[Factors] = field(default_factory=list)
    """What its gates act on."""


class Places:
    """Which gates each module obeys.

    Args:
        knobs: The model's own gates.
        share: What has gates of its own; None where the knobs are the gates.
        blocks: Names of the model's blocks, in order.
        width: d of what flows into a block.
    """

    def __init__(self, knobs: Gates, share: Share | None = None, blocks: Sequence[str] = (), width: int = 0) -> None:
        self.knobs = knobs
        self.found: dict[str, Place] = {}
        """Place by name."""
        self._share, self._blocks, self._width = share, blocks, width

    def at(self, module: str, width: int) -> Place | None:
        """The place that a module belongs to; None where the knobs are its gates.

        Modules outside of the blocks, such as a head, have gates of their own.

        Args:
            module: Its name, or that of the first of those that read the same input.
            width: Of its input.
        """
        if self._share is None:
            return None
        block = next((name for name in self._blocks if module.startswith(f"{name}.")), None)
        if self._share == "site" or block is None:
            return self._place(module, width, reads_input=True)
        name = MODEL if self._share == "model" else block
        return self._place(name, self._width, reads_input=False)

    def _place(self, name: str, width: int, *, reads_input: bool) -> Place:
        if name not in self.found:
            self.found[name] = Place(name, RoutedGates(self.knobs, reads_input=reads_input), width)
        return self.found[name]

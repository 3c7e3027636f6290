"""The knobs of a loadout: one is selected, some may be set aside for a while."""

from __future__ import annotations

from collections.abc import Mapping

from lmoe_cli.engine.engine import Engine

STEP = 0.05
LIMIT = 2.0
"""Knobs stop here; `/w` goes further."""


class Mixer:
    """Turns the weights of an engine and remembers those that were set aside.

    Every method may be called while the engine generates; see `Engine.set_weights` for the errors.

    Args:
        engine: Whose weights.
    """

    def __init__(self, engine: Engine) -> None:
        self.names = tuple(engine.weights)
        self.selected = 0
        """Number of the knob that `nudge` turns."""
        self._engine = engine
        self._aside: dict[str, float] = {}
        self._lifted: dict[str, float] = {}
        """The weight of an expert that acts only because it was asked to do so alone: 0."""

    @property
    def weights(self) -> dict[str, float]:
        """Expert's name → weight in force."""
        return self._engine.weights

    @property
    def labelled(self) -> dict[str, float]:
        """Weights in force as they are shown: ``×`` marks a knob that multiplies the recipe's rules per module."""
        return {f"{name} ×" if self.multiplies(name) else name: weight for name, weight in self.weights.items()}

    def multiplies(self, name: str) -> bool:
        """Whether the knob of an expert multiplies rules per module, and is not its weight itself."""
        entry = self._engine.loadout.recipe.experts.get(name)
        return entry is not None and isinstance(entry.weight, list)

    @property
    def aside(self) -> dict[str, float]:
        """Expert's name → the weight it had before it was muted."""
        return dict(self._aside)

    @property
    def can_turn(self) -> bool:
        return self._engine.router.can_turn

    def turn(self, weights: Mapping[str, float]) -> None:
        """Set weights; a muted expert that is named is muted no more."""
        self._engine.set_weights(weights)
        for name in weights:
            self._aside.pop(name, None)
            self._lifted.pop(name, None)

    def restore(self) -> None:
        """Give back all weights that were set aside."""
        self.turn({**self._aside, **self._lifted})

    @property
    def _own(self) -> dict[str, float]:
        """All weights as they are when nothing is set aside."""
        return {**self.weights, **self._aside, **self._lifted}

    def solo(self, name: str) -> None:
        """Mute all experts but one, which acts with its own weight, or 1 where that is 0."""
        self._check(name)
        weights = self._own
        aside = {other: weight for other, weight in weights.items() if other != name}
        self.turn({**dict.fromkeys(aside, 0.0), name: weights[name] or 1.0})
        self._aside, self._lifted = aside, {} if weights[name] else {name: weights[name]}

    def mute(self, name: str) -> bool:
        """Mute an expert, or give a muted one its weight back.

        Returns:
            Whether it is muted now.
        """
        self._check(name)
        if name in self._aside:
            self.turn({name: self._aside[name]})
            return False
        weight = self._own[name]
        self.turn({name: 0.0})
        self._aside[name] = weight
        return True

    def base(self) -> bool:
        """Mute all experts, or give all their weights back where all are muted.

        Returns:
            Whether they are muted now.
        """
        if len(self._aside) == len(self.names):
            self.restore()
            return False
        weights = self._own
        self.turn(dict.fromkeys(weights, 0.0))
        self._aside = weights
        return True

    def select(self, step: int) -> None:
        """Move the selection along, round and round."""
        if self.names:
            self.selected = (self.selected + step) % len(self.names)

    def nudge(self, steps: int) -> None:
        """Turn the selected knob by so many steps, within its limits."""
        if not self.names:
            return
        name = self.names[self.selected]
        before = self.weights[name]
        low, high = min(before, -LIMIT), max(before, LIMIT)
        self.turn({name: min(max(round(before + steps * STEP, 2), low), high)})

    def _check(self, name: str) -> None:
        """Refuse what cannot be turned, by turning it to where it stands."""
        self._engine.set_weights({name: self.weights.get(name, 0.0)})

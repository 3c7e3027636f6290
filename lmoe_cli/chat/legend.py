"""Letters and colours of experts on a terminal; all of it can be read without the colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from lmoe_cli.engine.legend import NOBODY, colours, leader, letters
from lmoe_cli.readable import visible


class Legend:
    """What stands for each expert.

    Args:
        names: Of the experts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._letters, self._colours = letters(names), colours(names)

    def mark(self, shares: Mapping[str, float]) -> Text:
        """The letter of the expert with most say: a capital where that is more than half, else a small one."""
        name = leader(shares)
        if name is None:
            return Text(NOBODY, "dim")
        strong = shares[name] > 0.5
        letter = self._letters[name]
        return Text(letter if strong else letter.lower(), f"{'bold ' if strong else ''}{self._colours[name]}")

    def letter(self, name: str) -> str:
        return self._letters[name]

    def colour(self, name: str) -> str:
        return self._colours[name]

    def bar(self, shares: Mapping[str, float], width: int) -> Text:
        """All shares in one bar of their letters; what is left of 1 is the base's."""
        text = Text()
        done, total = 0, 0.0
        for name in self.names:
            total += shares[name]
            until = round(total * width)
            text.append(self._letters[name] * (until - done), f"reverse {self._colours[name]}")
            done = until
        return text.append(NOBODY * (width - done), "dim")

    def name(self, name: str) -> Text:
        """An expert's letter and name."""
        return Text.assemble((self._letters[name], f"bold {self._colours[name]}"), f" {visible(name)}")

    def line(self) -> Text:
        """All letters with their names."""
        return Text("   ").join([self.name(name) for name in self.names])

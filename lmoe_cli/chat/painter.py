"""Who has most say in each piece of an answer: by colours, or where there are none by brackets with a letter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lmoe_cli.chat.events import Text
from lmoe_cli.chat.legend import Legend


class Painter:
    """Gives pieces of text their looks.

    Args:
        names: Gives the experts.
        is_coloured: The terminal shows colours.
    """

    def __init__(self, names: Callable[[], Sequence[str]], *, is_coloured: bool) -> None:
        self._names, self._is_coloured = names, is_coloured
        self._open: str | None = None
        """Whose bracket is open."""

    def add(self, event: Text) -> Iterator[tuple[str, str]]:
        """A piece, with what stands before it.

        Yields:
            Text, and its style by rich's names.
        """
        if self._is_coloured:
            yield event.text, Legend(self._names()).colour(event.expert) if event.expert else ""
            return
        if event.expert != self._open:
            space = event.text[: len(event.text) - len(event.text.lstrip())]
            yield self.end() + space, ""
            self._open = event.expert
            bracket = f"{Legend(self._names()).letter(event.expert)}[" if event.expert else ""
            yield bracket + event.text[len(space) :], ""
            return
        yield event.text, ""

    def end(self) -> str:
        """What closes the last bracket."""
        was_open, self._open = self._open is not None, None
        return "]" if was_open else ""


def fragment_style(style: str) -> str:
    """A style of rich by prompt_toolkit's name: ``bright_cyan`` is ``ansibrightcyan``."""
    return f"ansi{style.replace('_', '')}" if style else ""

"""Text that quotes what strangers wrote, made fit to be shown: one line, of bounded length, that steers no terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_QUOTED, MAX_WORD, MAX_TEXT = 80, 300, 1000
"""Characters of a value between quotes, of a name or path, and of a whole message."""
MAX_NAMED = 3
"""Of many names."""
QUOTED = re.compile(r"""(?<!\w)(['"])(?=\S)((?:(?!\1).){81,})(?<=\S)\1(?!\w)""", re.DOTALL)
WORD = re.compile(r"\S{301,}")


def readable(text: str) -> str:
    """A message as it may be shown: long values keep their beginning and end, and control characters are spelled."""
    text = visible(shortened(text, 4 * MAX_TEXT))  # what follows takes its time with long texts
    if len(text) > MAX_QUOTED:
        text = QUOTED.sub(lambda found: found[1] + shortened(found[2], MAX_QUOTED) + found[1], text)
        text = WORD.sub(lambda found: shortened(found[0], MAX_WORD), text)
    return shortened(text, MAX_TEXT)


def named(names: Iterable[object]) -> str:
    """The first few of many names, each once."""
    found = list(dict.fromkeys(str(name) for name in names))
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters of a text: its beginning, and something of its end."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 1]}…{text[-end:]}"


def visible(text: str) -> str:
    """The text with every character spelled out that would not be seen, as Python would."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )

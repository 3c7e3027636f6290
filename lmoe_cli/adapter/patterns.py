"""``rank_pattern`` and ``alpha_pattern``: which of their values a module has.

PEFT matches each key as a regular expression against the end of a module's name, from a dot on. The keys come from
strangers, and a regular expression can run for ever, so most are looked up as the plain names they are, and the others
are bounded in size and time.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lmoe_cli.errors import InvalidFileError

if TYPE_CHECKING:
    import regex

T = TypeVar("T")

PLAIN = re.compile(r"\^?[\w.-]+")
COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
MAX_LENGTH = 1000
MAX_REPEATS = 1000
"""Of all counts in an expression multiplied: they are unrolled when it is compiled."""
ONE_MATCH_S = 1.0
ALL_MATCHES_S = 5.0

Group = tuple[int, tuple[int, ...], bool]
"""Length of a plain name, where its dots are, and whether it must be the whole name."""


class Patterns(Generic[T]):
    """The values of a ``rank_pattern`` or ``alpha_pattern``.

    Args:
        values: Pattern → value, the first that matches counts.
        where: Name of the adapter, for messages.

    Raises:
        InvalidFileError: A pattern is no regular expression, or one that could take too long.
    """

    def __init__(self, values: Mapping[str, T], where: str) -> None:
        self._where = where
        self._values = list(values.items())
        self._plain: dict[Group, dict[str, int]] = {}
        self._regular: list[tuple[int, regex.Pattern[str]]] = []
        self._left_s = ALL_MATCHES_S
        for number, (pattern, _) in enumerate(self._values):
            if PLAIN.fullmatch(pattern):
                name = pattern.removeprefix("^")
                dots = tuple(place for place, letter in enumerate(name) if letter == ".")
                self._plain.setdefault((len(name), dots, name != pattern), {}).setdefault(name, number)
            else:
                self._regular.append((number, _compiled(pattern, where)))

    def value(self, module: str, default: T) -> T:
        """What a module has, ``default`` where no pattern matches.

        Raises:
            InvalidFileError: It takes too long to find out.
        """
        begun = time.thread_time()
        first = self._first_plain(module)
        for number, expression in self._regular:
            if number < first and self._matches(expression, number, module):
                first = number
                break
        self._left_s -= time.thread_time() - begun
        if self._left_s < 0:
            raise _refused(self._where, f"{len(self._values)} patterns take too long")
        return self._values[first][1] if first < len(self._values) else default

    def _first_plain(self, module: str) -> int:
        first = len(self._values)
        for (length, dots, whole), numbers in self._plain.items():
            start = len(module) - length
            if start < 0 or (start and (whole or module[start - 1] != ".")):
                continue
            letters = list(module[start:])
            for place in dots:  # in a regular expression a dot stands for any letter
                letters[place] = "."
            first = min(first, numbers.get("".join(letters), first))
        return first

    def _matches(self, expression: Any, number: int, module: str) -> bool:
        try:
            return bool(expression.match(module, timeout=ONE_MATCH_S))
        except (TimeoutError, RecursionError, MemoryError) as error:
            raise _refused(self._where, f"the pattern {self._values[number][0][:60]!r} takes too long") from error


def _compiled(pattern: str, where: str) -> Any:
    """A regular expression that can be stopped, and means what it means to Python's own library."""
    import regex

    name = f"the pattern {pattern[:60]!r}"
    repeats = 1
    for low, high in COUNT.findall(pattern):
        repeats *= max(1, int((high or low or "1")[:9]))
    if len(pattern) > MAX_LENGTH or repeats > MAX_REPEATS:
        raise _refused(where, f"{name} is too long")
    if "{" in COUNT.sub("", pattern):  # the other library reads it as something of its own
        raise _refused(where, f"{name} has a '{{' that begins no count")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(rf"(.*\.)?({pattern})$")
            return regex.compile(rf"(.*\.)?({pattern})$")
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise _refused(where, f"{name} is no regular expression: {error}") from error


def _refused(where: str, reason: str) -> InvalidFileError:
    hint = "mend rank_pattern or alpha_pattern in its config"
    return InvalidFileError("config-invalid", f"{where}: {reason}", hint=hint, where=where)

"""JSON from strangers: no duplicate keys, no NaN, bounded depth, always a clear error."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from lmoe_cli.errors import InvalidFileError

MAX_DEPTH = 32
AGAIN = "download or save it again, or mend it by hand"
HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""Where an escape may be one of a pair without the other."""


def parse_object(data: bytes, where: str, *, nonfinite: bool = False) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: UTF-8 text. The caller has bounded its length.
        where: Name of the file, for messages.
        nonfinite: Accept ``NaN`` and ``Infinity``, which some model configs hold as settings.

    Raises:
        InvalidFileError: Not UTF-8, not JSON, not an object, a key twice, too deep, or a number that is none.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise _RefusedError(f"the key {key[:80]!r} stands twice")
            found[key] = value
        return found

    def constant(name: str) -> float:
        if not nonfinite:
            raise _RefusedError(f"{name} is not a number")
        return float(name)

    def number(text: str) -> float:
        if not (nonfinite or math.isfinite(float(text))):
            raise _RefusedError(f"{text[:80]} is too large a number")
        return float(text)

    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
        if HALF_A_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        _fail(where, "half a character, which can be written nowhere", error)
    except UnicodeDecodeError as error:
        _fail(where, f"byte {error.start} is not UTF-8", error)
    except RecursionError as error:
        _fail(where, f"nested deeper than {MAX_DEPTH}", error)
    except json.JSONDecodeError as error:
        _fail(where, f"line {error.lineno} column {error.colno}: {error.msg}", error)
    except ValueError as error:  # a refusal of ours, or an integer of thousands of digits
        _fail(where, str(error).splitlines()[0][:200], error)
    if not isinstance(value, dict):
        message = f"{where}: holds {_kind(value)} where an object is due"
        raise InvalidFileError("json-invalid", message, hint=AGAIN, where=where)
    if _depth(value) > MAX_DEPTH:
        raise InvalidFileError("json-invalid", f"{where}: nested deeper than {MAX_DEPTH}", hint=AGAIN, where=where)
    return value


class _RefusedError(ValueError):
    """JSON that Python would take and we do not."""


def _fail(where: str, reason: str, cause: Exception) -> NoReturn:
    message = f"{where}: not valid JSON: {reason}"
    raise InvalidFileError("json-invalid", message, hint=AGAIN, where=where) from cause


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _depth(value: Any) -> int:
    level, found = [value], 0
    while level:
        found += 1
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(child for child in item.values() if isinstance(child, dict | list))
            elif isinstance(item, list):
                inner.extend(child for child in item if isinstance(child, dict | list))
        level = inner
    return found

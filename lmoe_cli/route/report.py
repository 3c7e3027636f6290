"""What there is to see, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.legend import letters
from lmoe_cli.engine.trace import Trace, trace
from lmoe_cli.engine.without import Change
from lmoe_cli.route.subject import Subject

By = Literal["none", "layer", "site"]
DIGITS = 6
"""Decimals of gates: more than float16 knows, and short enough to read."""


def report(engine: Engine, subject: Subject, left: Change | None = None, by: By = "none") -> dict[str, Any]:
    """What ``lmoe route --json`` tells, under ``data``.

    Args:
        engine: A router that decides per prompt has read the subject; `subject.subject` sees to that.
        subject: What to route.
        left: Of all tokens but the first; see `lmoe_cli.engine.without.compare`.
        by: What is told of each token beside the mean over all places: the mean of each layer, or each place.

    Returns:
        ``router, scope, experts, rest, scores, answer, tokens, layers, places, left_out, without``.
    """
    found = trace(engine, subject.tokens)
    return {
        "router": engine.router.settings.type,
        "scope": found.scope,
        **_shares(found, subject.told),
        "scores": _scores(engine),
        "answer": subject.answer,
        "tokens": _tokens(found, subject, left, by),
        "layers": [
            {"layer": _number(found, numbers), "label": label} | _mean(found, numbers, subject.told)
            for label, numbers in found.layers.items()
        ],
        "places": [
            {"place": spot.name, "layer": spot.layer} | _mean(found, [number], subject.told)
            for number, spot in enumerate(found.spots)
        ],
        "left_out": list(found.left_out),
        "without": _without(left, subject) if left else None,
    }


def _shares(found: Trace, told: Sequence[int]) -> dict[str, Any]:
    mean = found.shares()[list(told)].mean(0).tolist()
    own = letters(found.names)
    experts = [
        {"name": name, "letter": own[name], "share": _round(share)}
        for name, share in zip(found.names, mean, strict=True)
    ]
    return {"experts": experts, "rest": _round(max(0.0, 1 - sum(mean)))}


def _mean(found: Trace, places: Sequence[int], told: Sequence[int]) -> dict[str, Any]:
    return {
        "gates": _named(found.names, found.gates[list(places)].mean(0)[list(told)].mean(0)),
        "shares": _named(found.names, found.shares(places)[list(told)].mean(0)),
    }


def _tokens(found: Trace, subject: Subject, left: Change | None, by: By) -> list[dict[str, Any]]:
    each = found.gates.mean(0)  # (T, E)
    tokens: list[dict[str, Any]] = []
    for number, (token, text, part) in enumerate(zip(subject.tokens, subject.texts, subject.parts, strict=True)):
        told = {"id": token, "text": text, "part": part, "gates": _named(found.names, each[number])}
        if by == "layer":
            told["layers"] = {
                label: _named(found.names, found.gates[places, number].mean(0))
                for label, places in found.layers.items()
            }
        elif by == "site":
            told["places"] = {
                spot.name: _named(found.names, found.gates[place, number]) for place, spot in enumerate(found.spots)
            }
        if left:
            told |= _change(left, number)
        tokens.append(told)
    return tokens


def _change(left: Change, number: int) -> dict[str, float | None]:
    """What the expert does to one token; nothing is known of the first one, which nothing precedes."""
    if number == 0:
        return {"logprob": None, "logprob_without": None, "change": None}
    return {**left.token(number - 1)}


def _without(left: Change, subject: Subject) -> dict[str, Any]:
    """Over the answer where there is one, else over the text."""
    of = "answer" if subject.answer is not None else "text"
    at = [number - 1 for number, part in enumerate(subject.parts) if part == of and number]
    return {"expert": left.expert, "of": of, **left.over(at)}


def _scores(engine: Engine) -> dict[str, float] | None:
    """Of a router that compares the prompt with each expert."""
    scores: Tensor | None = getattr(engine.router, "scores", None)
    return None if scores is None else _named(engine.bank.names, scores)


def _number(found: Trace, places: Sequence[int]) -> int | None:
    return found.spots[places[0]].layer


def _named(names: Sequence[str], values: Tensor) -> dict[str, float]:
    return {name: _round(value) for name, value in zip(names, values.tolist(), strict=True)}


def _round(value: float) -> float:
    return round(value, DIGITS)


def share_of(gates: Mapping[str, float]) -> dict[str, float]:
    """Gates as shares, by name; see `lmoe_cli.engine.say`."""
    total = max(1.0, sum(map(abs, gates.values())))
    return {name: abs(gate) / total for name, gate in gates.items()}

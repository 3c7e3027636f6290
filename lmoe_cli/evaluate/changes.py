"""What one expert does to the tokens that are judged: the recipe, beside the recipe without it, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lmoe_cli.engine.without import Change
from lmoe_cli.evaluate.domains import Domain
from lmoe_cli.evaluate.measure import Scores
from lmoe_cli.evaluate.report import RECIPE
from lmoe_cli.evaluate.variants import Variant

NOTABLE = 0.1
"""Nats from which on a token counts as likelier, or less likely."""
LARGEST = 12
"""Tokens of a domain that are told by themselves."""
WINDOW = 16
"""Tokens before one of them that are told with it."""
SHOWN = 40
"""Characters of these that stand in a table."""


def changes(
    variants: Sequence[Variant],
    domains: Sequence[Domain],
    scores: Scores,
    texts: Callable[[Sequence[int]], list[str]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """What every expert that was left out does to every domain.

    Args:
        variants: Those of kind ``without`` are told.
        domains: What they were judged by.
        scores: What they came to.
        texts: Tokens → the text of each; see `lmoe_cli.engine.trace.texts`.

    Returns:
        Expert → domain → ``tokens, mean_change, total_change``; ``likelier`` and ``less_likely``, the shares of tokens
        that it changes by `NOTABLE` nats or more; and ``largest``, the tokens that it changes most, each ``where,
        before, text, logprob, logprob_without, change``.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in variants:
        if variant.kind != "without" or variant.expert is None:
            continue
        own = found.setdefault(variant.expert, {})
        for domain in domains:
            before, after = (-scores[name][domain.name].tokens for name in (RECIPE, variant.name))
            own[domain.name] = _of_domain(domain, Change(variant.expert, before, after), texts)
    return found


def domain_rows(domains: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What an expert does to each domain, as headings and rows of a table."""
    rows = [
        [name, f"{one['mean_change']:+.4f}", f"{one['likelier']:.1%}", f"{one['less_likely']:.1%}"]
        for name, one in domains.items()
    ]
    return ["", "mean", f"likelier by {NOTABLE}", f"less likely by {NOTABLE}"], rows


def token_rows(
    expert: str, domains: Mapping[str, Mapping[str, Any]], most: int = LARGEST
) -> tuple[list[str], list[list[str]]]:
    """The tokens that an expert changes most, as headings and rows of a table."""
    rows = [
        [name, repr(token["before"][-SHOWN:]), repr(token["text"]), *_numbers(token)]
        for name, one in domains.items()
        for token in one["largest"][:most]
    ]
    return ["", "after", "token", "with all", f"without {expert}", "change"], rows


def _numbers(token: Mapping[str, float]) -> list[str]:
    return [f"{token['logprob']:.3f}", f"{token['logprob_without']:.3f}", f"{token['change']:+.3f}"]


def _of_domain(domain: Domain, change: Change, texts: Callable[[Sequence[int]], list[str]]) -> dict[str, Any]:
    nats = change.nats
    owners = torch.arange(len(domain.cases)).repeat_interleave(torch.tensor([case.count for case in domain.cases]))
    positions = torch.cat([case.learned.nonzero().flatten() for case in domain.cases])
    largest = []
    for number in nats.abs().argsort(descending=True, stable=True)[:LARGEST].tolist():
        case, position = domain.cases[int(owners[number])], int(positions[number])
        shown = texts(case.tokens[max(0, position - WINDOW) : position + 1].tolist())
        told = {"where": case.record.where, "before": "".join(shown[:-1]), "text": shown[-1]}
        largest.append(told | change.token(number))
    return {
        **change.over(),
        "likelier": float((nats >= NOTABLE).double().mean()),
        "less_likely": float((nats <= -NOTABLE).double().mean()),
        "largest": largest,
    }

"""Judge every variant on every domain, one bank of experts at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lmoe_cli.evaluate.answers import is_answered, matches
from lmoe_cli.evaluate.domains import Domain
from lmoe_cli.evaluate.losses import per_record, token_nats
from lmoe_cli.evaluate.variants import Stage, Variant

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """What one variant came to on one domain, record by record."""

    nats: Tensor
    """(N,), float64."""
    tokens: Tensor
    """The same of each judged token, float32, record by record."""
    matches: Tensor | None = None
    """1 where the answer is the one that is due, (M,), float64, of the M records that have one."""


Scores = Mapping[str, Mapping[str, Score]]
"""Variant's name → domain's name → what it came to."""


def measure(
    stage: Stage,
    variants: Sequence[Variant],
    domains: Sequence[Domain],
    *,
    generates: bool = False,
    advance: Advance = lambda _: None,
) -> dict[str, dict[str, Score]]:
    """Judge variants on domains.

    Args:
        stage: With the base loaded.
        variants: In the order in which they share banks.
        domains: What is judged by.
        generates: Also answer every conversation, and compare.
        advance: Is told how many more of `work` are done.

    Raises:
        InvalidFileError: The model computes NaN or infinity.
    """
    found: dict[str, dict[str, Score]] = {}
    for variant in variants:
        own: dict[str, Score] = {}
        for domain in domains:
            nats = token_nats(stage.take(variant), domain.cases, advance)
            answered = [case for case in domain.cases if is_answered(case)] if generates else []
            said = matches(stage.take(variant), answered, advance) if answered else None
            own[domain.name] = Score(per_record(nats, domain.cases), nats, said)
        found[variant.name] = own
    return found


def work(variants: Sequence[Variant], domains: Sequence[Domain], *, generates: bool = False) -> int:
    """How many records all variants have to get through, about."""
    each = sum(len(domain.cases) for domain in domains)
    each += sum(is_answered(case) for domain in domains for case in domain.cases) if generates else 0
    return each * len(variants)


def best_single(variants: Sequence[Variant], scores: Scores, domains: Sequence[Domain]) -> dict[str, str]:
    """Domain → the variant of a single expert with the lowest loss there; empty where there is no expert."""
    single = [variant.name for variant in variants if variant.kind == "expert"]
    if not single:
        return {}
    return {
        domain.name: min(single, key=lambda name: float(scores[name][domain.name].nats.sum())) for domain in domains
    }

"""What an evaluation came to, as plain values: loss and exact match per variant and domain, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmoe_cli.evaluate.bootstrap import averaged, interval, resampled
from lmoe_cli.evaluate.domains import Domain
from lmoe_cli.evaluate.measure import Score, Scores
from lmoe_cli.evaluate.variants import Variant
from lmoe_cli.findings import Finding, finding
from lmoe_cli.loadout.routers import Scope

ORACLE = "oracle"
RECIPE = "recipe"


@dataclass(frozen=True)
class Measure:
    """A number that variants are compared by, on one domain."""

    sums: Callable[[Score], Tensor | None]
    counts: Tensor
    """What the sums are over, (N,), float64."""
    factor: float = 1.0
    """From the ratio of sums to the unit that is told."""


def report(
    variants: Sequence[Variant],
    domains: Sequence[Domain],
    scores: Scores,
    oracle: Mapping[str, str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Numbers of every variant.

    Args:
        variants: In the order of the table.
        domains: What they were judged by.
        scores: What they came to.
        oracle: Domain → name of the single expert chosen for it; empty for none.
        resamples: Draws of the bootstrap.
        seed: Of the draws.

    Returns:
        For each variant, and the oracle at last, ``name, kind, expert, weights``, ``domains`` (name → ``nats_per_token,
        bits_per_byte, exact_match`` and ``difference``, the same less the recipe's, each ``{value, low, high}``), and
        ``mean``, the same averaged over domains, each counting the same. None stands for what is not known.
    """
    everything = dict(scores)
    if oracle:
        everything[ORACLE] = {domain: scores[name][domain] for domain, name in oracle.items()}
    names = list(everything)
    by_domain = {domain.name: _domain(domain, names, everything, resamples, seed) for domain in domains}
    told: list[dict[str, Any]] = [
        {"name": one.name, "kind": one.kind, "expert": one.expert, "weights": dict(one.weights)} for one in variants
    ]
    if oracle:
        told.append({"name": ORACLE, "kind": ORACLE, "expert": None, "weights": None})
    for entry in told:
        own = {domain: found[entry["name"]] for domain, found in by_domain.items()}
        entry["domains"] = {domain: _plain(values) for domain, values in own.items()}
        entry["mean"] = _plain(_mean(list(own.values())))
        if entry["kind"] == ORACLE:
            for domain, name in oracle.items():
                entry["domains"][domain]["chosen"] = name
    return told


def facts(domain: Domain) -> dict[str, Any]:
    """What a domain is."""
    tally = domain.tally
    return {
        "file": str(domain.path),
        "sha256": domain.sha256,
        "split": domain.split,
        "records": len(domain.cases),
        "tokens": int(sum(len(case.tokens) for case in domain.cases)),
        "judged_tokens": int(domain.counts.sum()),
        "judged_bytes": int(domain.sizes.sum()),
        "truncated": tally.truncated,
        "left_out": tally.skipped + tally.unlearned,
    }


def remarks(domains: Sequence[Domain], scope: Scope) -> list[Finding]:
    """What has to be known to read the numbers.

    Args:
        domains: What was judged by.
        scope: What the recipe's router decides for.
    """
    found = []
    for domain in domains:
        where = str(domain.path)
        if told := domain.tally.told():
            found.append(finding("data-cut", where, f"{domain.name}: {told}", "--max-tokens and --too-long decide"))
        if len(domain.cases) == 1:
            message = f"{domain.name}: one record tells nothing of others, so there is no interval"
            found.append(finding("interval-missing", where, message, "more records"))
        texts = sum(not case.record.messages for case in domain.cases)
        if texts and scope == "prompt":
            message = f"{domain.name}: the router decides by prompts, and had no say in {texts} texts without one"
            found.append(finding("eval-unrouted", where, message, "records with `messages`"))
    return found


@dataclass(frozen=True)
class _Value:
    value: float | None
    means: Tensor | None
    """Under every draw, (R,), float64; None where there is no interval."""
    less: Tensor | None
    """The recipe's under the same draws."""
    recipe: float | None


_Values = dict[str, _Value]


def _domain(domain: Domain, names: Sequence[str], scores: Scores, resamples: int, seed: int) -> dict[str, _Values]:
    """Variant → numbers on a domain, by name."""
    matched = scores[RECIPE][domain.name].matches
    measures = {
        "nats_per_token": Measure(lambda score: score.nats, domain.counts),
        "bits_per_byte": Measure(lambda score: score.nats, domain.sizes, 1 / math.log(2)),
        "exact_match": Measure(
            lambda score: score.matches, torch.ones(0 if matched is None else len(matched)).double()
        ),
    }
    found: dict[str, _Values] = {name: {} for name in names}
    for key, measure in measures.items():
        if not float(measure.counts.sum()):
            for values in found.values():
                values[key] = _Value(None, None, None, None)
            continue
        own = [sums for name in names if (sums := measure.sums(scores[name][domain.name])) is not None]
        sums = torch.stack(own) * measure.factor  # (V, N)
        means = resampled(sums, measure.counts, resamples, seed)
        ratios = (sums.sum(1) / measure.counts.sum()).tolist()
        at = names.index(RECIPE)
        for number, name in enumerate(names):
            own_means, less = (None, None) if means is None else (means[:, number], means[:, at])
            found[name][key] = _Value(ratios[number], own_means, less, ratios[at])
    return found


def _mean(domains: Sequence[_Values]) -> _Values:
    found: _Values = {}
    for key in domains[0]:
        own = [values[key] for values in domains]
        value, recipe = (_average([getattr(one, name) for one in own]) for name in ("value", "recipe"))
        found[key] = _Value(value, averaged([one.means for one in own]), averaged([one.less for one in own]), recipe)
    return found


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _plain(values: _Values) -> dict[str, Any]:
    told: dict[str, Any] = {key: one.value for key, one in values.items()}
    told["difference"] = {key: _difference(one) for key, one in values.items()}
    return told


def _difference(one: _Value) -> dict[str, float | None] | None:
    if one.value is None or one.recipe is None:
        return None
    low = high = None
    if one.means is not None and one.less is not None:
        low, high = interval(one.means, one.less)
    return {"value": one.value - one.recipe, "low": low, "high": high}

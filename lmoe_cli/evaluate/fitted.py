"""What weights that were found are worth: on the data they were found with, and on records that were kept from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmoe_cli.data.examples import Encoder
from lmoe_cli.data.splits import Split as Sides
from lmoe_cli.engine.engine import Engine
from lmoe_cli.evaluate.bootstrap import averaged, interval, resampled
from lmoe_cli.evaluate.domains import Domain, domain_of
from lmoe_cli.evaluate.losses import record_nats
from lmoe_cli.findings import Finding, finding
from lmoe_cli.split_names import TRAIN, VALID

RESAMPLES = 1000


def read_sides(
    files: Mapping[str, Path],
    encoder: Callable[[], Encoder],
    decode: Callable[[Sequence[int]], str],
    *,
    held_out: float,
    limit: int,
    seed: int,
) -> tuple[list[Domain], list[Domain]]:
    """What weights are found with, and what is kept to judge them by.

    Args:
        files: Name → file.
        encoder: Makes one that counts from nothing.
        decode: Tokens → text.
        held_out: Share of the records that do not say their split, 0 to 1.
        limit: Most records of each file and side.
        seed: Draws that share.

    Returns:
        A domain per file, and one per file that has something held out.

    Raises:
        NotFoundError, InvalidFileError: See `domains.read_domain`.
    """
    train, valid = [], []
    for name, path in files.items():
        sides = Sides(path, fraction=held_out, seed=seed)
        train.append(domain_of(name, path, islice(sides.train(), limit), TRAIN, encoder(), decode))
        if kept := list(islice(sides.held_out(), limit)):
            valid.append(domain_of(name, path, kept, VALID, encoder(), decode))
    return train, valid


def judged(engine: Engine, weights: Mapping[str, float], domains: Sequence[Domain]) -> list[Tensor]:
    """Loss of each record of each domain under some weights, (N,), float64, in nats."""
    engine.set_weights(weights)
    return [record_nats(engine, domain.cases) for domain in domains]


def losses(before: Sequence[Tensor], after: Sequence[Tensor], domains: Sequence[Domain], seed: int) -> dict[str, Any]:
    """Nats per token before and after, averaged over domains, and the difference.

    Returns:
        ``records, start, found, difference``; the last is ``{value, low, high}`` with the 95 % interval of a paired
        bootstrap, None where a domain has one record.
    """
    start, found = (
        sum(float(nats.sum() / domain.counts.sum()) for nats, domain in zip(side, domains, strict=True)) / len(domains)
        for side in (before, after)
    )
    pairs = zip(before, after, domains, strict=True)
    drawn = averaged([resampled(torch.stack(pair), domain.counts, RESAMPLES, seed) for *pair, domain in pairs])
    low, high = interval(drawn[:, 1], drawn[:, 0]) if drawn is not None else (None, None)
    return {
        "records": sum(len(domain.cases) for domain in domains),
        "start": start,
        "found": found,
        "difference": {"value": found - start, "low": low, "high": high},
    }


def about_fit(held_out: Mapping[str, Any] | None, where: str) -> list[Finding]:
    """What has to be known before the weights are used."""
    if held_out is None:
        message = "nothing was held out, so nobody knows what the weights are worth on other text"
        return [finding("fit-unjudged", where, message, "records with `split: valid`, or --held-out 0.1")]
    low, high = held_out["difference"]["low"], held_out["difference"]["high"]
    if held_out["found"] >= held_out["start"]:
        message = "the weights found are no better on held-out records than those to begin with"
        return [finding("fit-no-gain", where, message, "more records, fewer --groups, or keep the recipe as it is")]
    if low is not None and low < 0 < high:
        message = "on held-out records the gain is within what chance gives"
        return [finding("fit-no-gain", where, message, "more records, or fewer --groups")]
    return []

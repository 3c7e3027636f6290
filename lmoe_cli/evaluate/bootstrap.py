"""How far a difference between two variants would move on other records of the same kind.

    d = sum_i v_i / sum_i c_i - sum_i w_i / sum_i c_i

v and w are losses of the same records i under two variants, c their counts. Records are drawn with replacement, as many
as there are, the same for all variants; the interval is between the 2.5th and 97.5th percentile of d over many draws
(Efron and Tibshirani 1993, sec. 13.3: the percentile interval). Over several domains each draws its own records, and
the mean of their d counts every domain the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95
AT_ONCE = 1 << 22
"""Record numbers that are drawn at a time."""


class Interval(NamedTuple):
    """Where 95 % of the draws lie."""

    low: float
    high: float


def draws(count: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each record is drawn.

    Args:
        count: N, records.
        resamples: R.
        seed: Of the draws.

    Yields:
        Blocks of (some, N), float64, R rows in all.
    """
    generator = torch.Generator().manual_seed(seed)
    step = max(1, AT_ONCE // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = torch.randint(count, (rows, count), generator=generator)
        often = torch.zeros(rows, count, dtype=torch.float64)
        yield often.scatter_add_(1, drawn, torch.ones_like(often))


def resampled(sums: Tensor, counts: Tensor, resamples: int, seed: int) -> Tensor | None:
    """Means of several variants under the same draws.

    Args:
        sums: Of each variant and record, (V, N), float64.
        counts: What they are sums over, (N,), float64.
        resamples: R.
        seed: Of the draws.

    Returns:
        (R, V), float64; None where one record is all that counts, which tells nothing about others, or where a draw
        has nothing to divide by.
    """
    if int((counts != 0).sum()) < 2:
        return None
    found = [(block @ sums.T) / (block @ counts)[:, None] for block in draws(sums.shape[1], resamples, seed)]
    means = torch.cat(found)
    return means if bool(torch.isfinite(means).all()) else None


def interval(means: Tensor, against: Tensor) -> Interval:
    """The interval of a difference.

    Args:
        means: Of a variant, (R,), float64.
        against: Of another one under the same draws, (R,), float64.
    """
    edge = (1 - LEVEL) / 2
    low, high = torch.quantile(means - against, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return Interval(low, high)


def averaged(domains: Sequence[Tensor | None]) -> Tensor | None:
    """The mean over domains of what `resampled` gives; None where a domain has no such."""
    known = [means for means in domains if means is not None]
    return torch.stack(known).mean(0) if known and len(known) == len(domains) else None

"""Intervals are those of a paired bootstrap, worked by hand."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from lmoe_cli.evaluate.bootstrap import averaged, draws, interval, resampled


def test_draws_take_as_many_records_as_there_are_with_replacement():
    found = torch.cat([*draws(7, 300, seed=1)])
    assert found.shape == (300, 7)
    assert (found.sum(1) == 7).all()
    assert 0.5 < float(found.var()) < 1.3  # a multinomial's: 6/7
    assert torch.equal(torch.cat([*draws(7, 300, seed=1)]), found)
    assert not torch.equal(torch.cat([*draws(7, 300, seed=2)]), found)


def test_an_interval_by_hand():
    sums = torch.tensor([[1.0, 3.0, 8.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    counts = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    by_hand = []
    for often in torch.cat([*draws(3, 400, seed=5)]).tolist():
        records = [record for record, times in enumerate(often) for _ in range(int(times))]
        tokens = sum((1, 1, 2)[record] for record in records)
        by_hand.append(sum((1, 3, 8)[record] for record in records) / tokens - len(records) / tokens)
    by_hand.sort()
    means = resampled(sums, counts, 400, seed=5)
    low, high = interval(means[:, 0], means[:, 1])
    # numpy's and torch's rule: between the two neighbours of 0.025 (n - 1)
    position = 0.025 * 399
    below = int(position)
    assert low == pytest.approx(by_hand[below] + (position - below) * (by_hand[below + 1] - by_hand[below]))
    assert high == pytest.approx(by_hand[-1 - below] - (position - below) * (by_hand[-1 - below] - by_hand[-2 - below]))


def test_the_interval_of_many_records_is_that_of_the_normal_distribution():
    rng = random.Random(0)
    values = [rng.gauss(2, 3) for _ in range(400)]
    sums = torch.tensor([values, [0.0] * 400], dtype=torch.float64)
    means = resampled(sums, torch.ones(400).double(), 4000, seed=0)
    low, high = interval(means[:, 0], means[:, 1])
    half = 1.96 * statistics.pstdev(values) / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (high + low) / 2 == pytest.approx(statistics.fmean(values), abs=0.1 * half)


def test_variants_are_compared_on_the_same_records():
    """Records differ by far more than variants do, and that does not widen the interval."""
    base = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1000
    means = resampled(torch.stack([base + 1, base]), torch.ones(50).double(), 200, seed=0)
    assert interval(means[:, 0], means[:, 1]) == pytest.approx((1, 1))


def test_one_record_has_no_interval_and_neither_has_a_mean_with_it():
    one = resampled(torch.ones(2, 1).double(), torch.ones(1).double(), 100, seed=0)
    two = resampled(torch.ones(2, 5).double(), torch.ones(5).double(), 100, seed=0)
    assert one is None
    assert averaged([one, two]) is None
    assert averaged([two, two]).shape == (100, 2)


def test_a_draw_with_nothing_to_divide_by_gives_no_interval():
    counts = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert resampled(torch.ones(2, 5).double(), counts, 1000, seed=0) is None

"""Cutting a blend to a rank is the best there is, and says what it costs."""

from __future__ import annotations

import pytest
import torch

from lmoe_cli.bake.lowrank import padded, truncate


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_the_product_is_that_of_a_singular_value_decomposition_cut_off(rank):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(12, 50, generator=generator), torch.randn(30, 12, generator=generator)
    cut_a, cut_b, error = truncate(a, b, rank)
    u, s, vh = torch.linalg.svd((b @ a).double(), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    torch.testing.assert_close((cut_b @ cut_a).double(), best, rtol=1e-4, atol=1e-4)
    assert error == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-5)
    assert cut_a.shape == (rank, 50)
    assert cut_b.shape == (30, rank)


def test_padding_changes_the_rank_and_not_the_product():
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    wide_a, wide_b = padded(a, b, 8)
    assert wide_a.shape == (8, 5)
    assert torch.equal(wide_b @ wide_a, b @ a)

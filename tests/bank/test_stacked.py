"""However B lies in memory, it is the same B."""

from __future__ import annotations

import pytest
import torch

from lmoe_cli.bank.product import Products, native
from lmoe_cli.bank.stacked import FEW, StackedB

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [[4], [2, 3], [4] * (FEW + 2), [*range(1, FEW + 3)]])
@pytest.mark.parametrize("vectors", [1, 5])
def test_products_with_it_are_those_of_its_parts_side_by_side(ranks, dtype, vectors):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(24, rank, generator=generator).to(dtype).float() for rank in ranks]
    low = torch.randn(vectors, sum(ranks), generator=generator).to(dtype)
    y = torch.randn(vectors, 24, generator=generator).to(dtype)
    exact = y.double() + low.double() @ torch.cat(parts, dim=1).double().T
    b = StackedB(parts, dtype, CPU)
    slack = 1e-5 if dtype is torch.float32 else 0.15  # bfloat16 may round after each expert
    torch.testing.assert_close(b.add(y.clone(), low, Products()).double(), exact, rtol=0, atol=slack)
    if vectors == 1:
        alone = y.clone()
        b.add_one(alone, low, Products(one=native) if dtype is torch.bfloat16 else Products())
        torch.testing.assert_close(alone.double(), exact, rtol=0, atol=slack)
    assert torch.equal(b.matrix.float(), torch.cat(parts, dim=1))
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        assert torch.equal(b.of(slice(start, stop)).float(), part)
        assert b.of(slice(start, stop)).untyped_storage().data_ptr() == b.tensor.untyped_storage().data_ptr()
        start = stop
    if len(set(ranks)) == 1:
        assert torch.equal(b.each().float(), torch.stack(parts).transpose(1, 2))

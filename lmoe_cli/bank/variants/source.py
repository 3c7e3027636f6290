"""What a variant may ask for while it makes a delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Contents:
    """The tensors of one part of an adapter, and the matrix of the base that it changes."""

    read: Callable[[str], Tensor]
    """Role → tensor, finite; of stacked experts only the one at hand. Float32, but for ``saved_weight``: as stored."""
    has: Callable[[str], bool]
    scaling: float
    """s, dimensionless."""
    d_in: int
    """Inputs of W."""
    weight: Callable[[], Tensor]
    """W, (d_out, d_in), float32. Read only when it is needed."""
    bias: Callable[[], Tensor | None]
    """The base's bias, (d_out,), float32."""
    transposed: bool
    """W is stored as (d_in, d_out)."""

"""B of all experts on one module, in the order in memory that is read fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe_cli.bank.product import Products

FEW = 8
"""Experts that a blend may have at once. Where there are more, only a few of them act on a token."""


class StackedB:
    """The B of several experts, side by side or one after the other.

    On a CPU, a product of a single vector with (2048, 128) takes 47 us column by column and 100 us row by row in
    float32, and 48 and 31 us in bfloat16, measured on two cores. Of many experts each has its own in one piece.

    Args:
        parts: B of each expert, (d_out, its R), float32.
        dtype: Of the stack.
        device: Where to.
    """

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> None:
        ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0).tolist()
        self._columns = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        is_even = len({part.shape[1] for part in parts}) == 1
        self._is_piled = device.type == "cpu" and dtype != torch.float32 and len(parts) > FEW and is_even
        if self._is_piled:
            self.tensor = torch.stack([part.to(device, dtype) for part in parts])  # (E, d_out, R)
        else:
            beside = torch.cat(list(parts), dim=1).to(device, dtype)
            is_by_column = device.type == "cpu" and dtype == torch.float32
            self.tensor = beside.T.contiguous().T if is_by_column else beside  # (d_out, sum of R)
        self._transposed = None if self._is_piled else self.tensor.T

    def lay_by_row(self) -> None:
        """Lie as a loop reads it that goes from row to row, as the compiler makes it; see `Products.add`."""
        if not self._is_piled:
            self.tensor = self.tensor.contiguous()
            self._transposed = self.tensor.T

    @property
    def matrix(self) -> Tensor:
        """All side by side, (d_out, sum of R)."""
        return self.tensor.transpose(0, 1).flatten(1) if self._is_piled else self.tensor

    def of(self, columns: slice) -> Tensor:
        """One expert's part, (d_out, R), a view.

        Args:
            columns: Where it is among all side by side.
        """
        return self.tensor[self._columns.index(columns)] if self._is_piled else self.tensor[:, columns]

    def each(self) -> Tensor:
        """All parts transposed, (E, R, d_out), a view. Only for equal ranks."""
        if self._is_piled:
            return self.tensor.transpose(1, 2)
        return self.tensor.view(len(self.tensor), len(self._columns), -1).permute(1, 2, 0)

    def add(self, y: Tensor, low: Tensor, products: Products) -> Tensor:
        """Add B low to y, in place where that is possible.

        Args:
            y: (N, d_out), any float dtype.
            low: (N, sum of R), in the dtype of B.
            products: Kernels to use.

        Returns:
            (N, d_out), in the dtype of ``y``.
        """
        if not self._is_piled:
            return products.add(y, low, self.tensor)
        for part, columns in zip(self.tensor, self._columns, strict=True):
            y = products.add(y, low[:, columns], part)
        return y

    def add_one(self, y: Tensor, low: Tensor, products: Products) -> None:
        """The same in place for one vector, outside of compiled code.

        Args:
            y: (1, d_out), in the dtype of B.
            low: (1, sum of R), likewise.
            products: Kernels to use.
        """
        if self._transposed is not None:
            products.add_one(y, low, self._transposed)
            return
        for part, columns in zip(self.tensor, self._columns, strict=True):
            products.add_one(y, low[:, columns], part.T)

"""A group of linear layers that share an input, computed together by the kernels for CUDA devices.

What they compute is what `shared` and `linear` compute one after the other, for q, k and v in two launches instead of
nine. See `lmoe_cli.bank.fused`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmoe_cli.bank.fused import launch, ops
from lmoe_cli.bank.fused.group import Table
from lmoe_cli.bank.fused.tiles import MAX_BATCH
from lmoe_cli.bank.product import plain_parameters

if TYPE_CHECKING:
    from lmoe_cli.bank.linear import BlendedLinear
    from lmoe_cli.bank.shared import SharedInput


class FusedSite:
    """Members of a group and their stacked factors, for decoding on a CUDA device.

    Args:
        shared: The stacked A.
        members: The layers, in the order of the stack.
    """

    def __init__(self, shared: SharedInput, members: Sequence[BlendedLinear]) -> None:
        self._shared = shared
        self._members = tuple(members)
        self._b = [member.b.matrix for member in members if member.b is not None]
        self._starts = [start for start, _ in shared.bounds]
        layouts = [
            [(expert, piece.rank) for expert, pieces in member.pieces.items() for piece in pieces]
            for member in shared.members
        ]
        self._table = Table.of(layouts, shared.gates.values.shape[-1], shared.a.device)

    @staticmethod
    def is_possible(shared: SharedInput) -> bool:
        """Whether the kernels run where the factors are, and know where each expert's are."""
        once = all(len(pieces) == 1 for member in shared.members for pieces in member.pieces.values())
        return once and launch.is_available(shared.a.device)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels are made for these activations: few vectors, in the dtype of the factors, no gradient."""
        few = 1 <= x.numel() // x.shape[-1] <= MAX_BATCH
        return few and x.dtype == self._shared.a.dtype and not torch.is_grad_enabled()

    def whole(self, x: Tensor, member: int) -> Tensor | None:
        """What a member gives, base and low-rank parts; None where only its base can compute its product.

        Args:
            x: Its input, (..., d_in). Members called with the same tensor are computed together.
            member: Which one asks.

        Returns:
            (..., d_out), in the dtype of ``x``.
        """
        if not all(plain_parameters(layer.base, x.dtype) and not layer.bends for layer in self._members):
            return None
        ys = self._shared.latest.share(self._shared, x, self._shared.asking, self._together)
        y: Tensor = ys[member]
        return y.view(*x.shape[:-1], -1)

    def behind(self, x: Tensor, y: Tensor, member: int) -> Tensor:
        """Add a member's low-rank part to what its base gave.

        Args:
            x: Its input, (..., d_in).
            y: (..., d_out), any float dtype.
            member: Which one.
        """
        flat = x.reshape(-1, x.shape[-1])
        start, stop = self._shared.bounds[member]
        factors = (self._shared.a[start:stop], [self._b[member]], [0])
        gates = self._gates(x)[:, start:stop].contiguous()
        result: Tensor = ops.behind(flat, [y.reshape(len(flat), -1)], *factors, gates)[0]
        return result.view(y.shape)

    def _together(self, x: Tensor) -> list[Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        own = [plain_parameters(layer.base, x.dtype) for layer in self._members]
        weights = [parameters[0] for parameters in own if parameters]
        biases = [parameters[1] for parameters in own if parameters]
        factors = (self._shared.a, self._b, self._starts)
        gates = self._gates(x)
        if (chosen := self._shared.gates.chosen()) is not None:
            table = (self._table.places, self._table.max_rank)
            few: list[Tensor] = ops.grouped_chosen(flat, weights, biases, *factors, *chosen, *table)
            return few
        all_: list[Tensor] = ops.grouped(flat, weights, biases, *factors, gates)
        return all_

    def _gates(self, x: Tensor) -> Tensor:
        """The gate of each row of A, (rows, sum of R), float32; of each vector or of as many in a row as x has more."""
        gates, shared = self._shared.gates, self._shared
        found = gates.coefficients(shared.layout, shared.owner, torch.float32)
        if not gates.are_same:
            gates.spread(found, x)  # refuses a batch that they are not for
        return found.flatten(0, -2)

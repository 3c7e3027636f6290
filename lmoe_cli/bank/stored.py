"""The base's matrices as they are stored, one target at a time."""

from __future__ import annotations

from torch import Tensor

from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.loadout.layout import Target


def stored_matrix(reader: TensorReader, target: Target) -> Tensor:
    """The matrix of a target as it is stored, (d_out, d_in) or (d_in, d_out), in its own dtype; of a norm (d_out,)."""
    stored = reader.tensor(target.tensor)
    return stored if target.index is None else rows_of(stored[target.index], target)


def rows_of(matrix: Tensor, target: Target) -> Tensor:
    """The outputs of a slice that a target means, as a view."""
    if target.rows is None:
        return matrix
    return matrix[:, slice(*target.rows)] if target.transposed else matrix[slice(*target.rows)]

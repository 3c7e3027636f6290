"""The base's matrices as they are stored, for deltas that need them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lmoe_cli.bake.plan import bias_name
from lmoe_cli.bank.stored import stored_matrix
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.base import Base
from lmoe_cli.loadout.layout import Target


def stored_at(
    base: Base, reader: TensorReader, target: Target
) -> tuple[Callable[[], Tensor], Callable[[], Tensor | None]]:
    """What gives the matrix of a target, (d_out, d_in), and its bias, (d_out,), float32. Nothing is read before.

    The matrix raises UsageError where it is stored quantised in a way that lmoe cannot read.
    """

    def weight() -> Tensor:
        if target.packed or base.stored[target.tensor].info.dtype not in FLOATS:
            message = f"{target.module}: an expert needs its weights, which are stored quantised ({base.quantization})"
            hint = "name the unquantised model as base"
            raise UsageError("bake-quantized", message, hint=hint, where=target.module)
        stored = stored_matrix(reader, target).float()
        return stored.T if target.transposed and stored.dim() == 2 else stored

    def bias() -> Tensor | None:
        name = bias_name(base, target)
        return reader.tensor(name).float() if name else None

    return weight, bias

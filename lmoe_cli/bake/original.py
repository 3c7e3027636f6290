"""The unquantised model that a packed base was made from: is it that, and how far is it from what the base stands for?

    distance = ||W - Q|| / ||W||       per matrix: W the original, Q what its packed form stands for, Frobenius norms

That a model is the original is not believed by its name. Packing puts every weight on the code next to it, so the
original's weights lie next to the codes they have. Those of any other model, be it the same one trained a little
further, lie next to others in part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe_cli.adapter.names import HEADS
from lmoe_cli.checkpoint.dequantize import Matrix
from lmoe_cli.checkpoint.packed import Packed
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.findings import RefusedError, finding
from lmoe_cli.loadout.base import Base
from lmoe_cli.readable import named

MAX_MISPLACED = 0.03
"""Share of a matrix that may lie next to other codes: packed scales, and roundings on the way, move up to 1 %."""
BLOCK_ELEMENTS = 1 << 18
"""Weights compared at a time: few enough for the cache, and twice as fast as four times as many."""


@dataclass(frozen=True)
class Distance:
    """How far one matrix of the original is from what its packed form stands for."""

    name: str
    """In the packed checkpoint."""
    distance: float
    """Frobenius norm of the difference, relative to that of the original."""
    misplaced: float
    """Share of the original's weights that would have been packed as another code."""


def require_same_layout(base: Base, original: Base) -> dict[str, str]:
    """Refuse a model that is not of the architecture and shapes of a packed one.

    Args:
        base: Taken as dequantised.
        original: What it is said to be made from. Headers are enough.

    Returns:
        Name of each tensor in ``base`` → its name in ``original``.

    Raises:
        RefusedError: It is another kind of model, is quantised itself, or has other tensors.
    """
    if reasons := list(_kind(base, original)):
        raise _refused(base, original, reasons)
    names: dict[str, str] = {}
    missing, misfits = [], []
    for name, tensor in base.stored.items():
        found = _same_tensor(original, name)
        if found is None:
            missing.append(name)
        elif (shape := original.stored[found].info.shape) != tensor.info.shape:
            misfits.append(f"{name} is {shape}, not {tensor.info.shape}")
        else:
            names[name] = found
    if missing:
        reasons.append(f"it has no {named(missing)}")
    if misfits:
        reasons.append(f"its {named(misfits)}")
    if reasons:
        raise _refused(base, original, reasons)
    return names


def _kind(base: Base, original: Base) -> Iterator[str]:
    if original.quantization:
        yield f"it is stored quantised itself ({original.quantization})"
    if original.model_type != base.model_type:
        yield f"it is a {original.model_type}, not a {base.model_type}"


def _same_tensor(original: Base, name: str) -> str | None:
    """What the original calls a tensor, which may be an output head that it ties to its embedding."""
    found = original.layout.tensor(name, "")
    is_head = name.removesuffix(".weight").rpartition(".")[2] in HEADS
    return original.layout.embedding if found is None and is_head and original.is_tied else found


def distances(
    base: Base, original: Base, names: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> list[Distance]:
    """Compare every packed matrix with the original's.

    Args:
        base: Taken as dequantised.
        original: Its files are on this machine.
        names: See `require_same_layout`.
        advance: Told the bytes of the original that were compared.

    Raises:
        RefusedError: The weights are not those that were packed.
    """
    found: list[Distance] = []
    loaded_in = getattr(torch, base.runs_in or "float32")
    with (
        TensorReader(base.stored, base.source.require) as packed,
        TensorReader(original.stored, original.source.require) as plain,
    ):
        for name, tensor in base.stored.items():
            if isinstance(tensor, Packed):
                dense = plain.tensor(names[name])
                dense = dense.T if tensor.transposed else dense
                found.append(_distance(name, packed.packed(tensor), dense, loaded_in))
                advance(dense.numel() * dense.element_size())
    wrong = [item for item in found if not item.misplaced <= MAX_MISPLACED]
    if wrong:
        worst = max(wrong, key=lambda item: item.misplaced)
        share = f"{worst.misplaced:.0%} of its {worst.name} would have become other codes"
        raise _refused(base, original, [f"{share}, and so in {len(wrong)} of {len(found)} matrices"])
    return found


def _distance(name: str, matrix: Matrix, dense: Tensor, loaded_in: torch.dtype) -> Distance:
    """Args are as packed; ``loaded_in`` is what the original was rounded to before it was packed."""
    step = max(1, BLOCK_ELEMENTS // matrix.shape[1])
    total = apart = 0.0
    misplaced = 0
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        exact = dense[rows].to(torch.float32)
        total += float(torch.linalg.vector_norm(exact)) ** 2
        apart += float(torch.linalg.vector_norm(matrix[rows].to(torch.float32) - exact)) ** 2
        misplaced += matrix.misplaced(rows, exact.to(loaded_in))
    return Distance(name, math.sqrt(apart / total) if total else 0.0, misplaced / max(1, dense.numel()))


def _refused(base: Base, original: Base, reasons: list[str]) -> RefusedError:
    hint = "name the model it was quantised from; to bake onto this one all the same, name it as base in the recipe"
    found = [
        finding(
            "original-differs", original.ref, f"{original.ref} is not what {base.ref} was made from: {reason}", hint
        )
        for reason in reasons
    ]
    return RefusedError(f"{original.ref}: not the original of {base.ref}", found)

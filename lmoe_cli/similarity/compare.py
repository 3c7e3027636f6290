"""Compare deltas in one pass over the adapters' files, one matrix of the base at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lmoe_cli.bank.delta import Delta, Update, update
from lmoe_cli.bank.load import ExpertWeights, open_expert
from lmoe_cli.bank.stored import stored_matrix
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.similarity.geometry import Spaces, inner_products, nearness, spaces
from lmoe_cli.similarity.plan import Changed, Plan


@dataclass(frozen=True)
class Sums:
    """What adds up over matrices. Every tensor is float64; E adapters, and two sides: input, output."""

    matrices: int
    inner: Tensor
    """<dW_i, dW_j>, (E, E); a matrix that only one changes adds nothing to a pair."""
    squares: Tensor
    """|dW_i|^2 over the matrices that j changes too, (E, E)."""
    shared: Tensor
    """How many matrices both change, (E, E); of i alone on the diagonal."""
    near: Tensor
    """|Q_i' Q_j|^2, (2, E, E)."""
    chance: Tensor
    """What random subspaces of the same ranks give on average, (2, E, E)."""
    most: Tensor
    """min(r_i, r_j), (E, E)."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.matrices + other.matrices,
            self.inner + other.inner,
            self.squares + other.squares,
            self.shared + other.shared,
            self.near + other.near,
            self.chance + other.chance,
            self.most + other.most,
        )


def compare(plan: Plan, advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[Changed, Sums]]:
    """Measure every matrix that some adapter changes.

    Args:
        plan: With its files on this machine; see `Plan.fetched`.
        advance: Told how many bytes of the adapters were read.

    Yields:
        Each matrix and what was measured there.

    Raises:
        InvalidFileError: A weight is not finite, or a delta too large for float32.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_expert(expert)) for expert in plan.experts]
        reader = None
        if plan.loadout and plan.needs_weights:
            base = plan.loadout.base
            reader = stack.enter_context(TensorReader(base.stored, base.source.require))
        for changed in plan.matrices:
            yield changed, _measure(changed, opened, reader)
            advance(changed.size)


def _measure(changed: Changed, opened: Sequence[ExpertWeights], reader: TensorReader | None) -> Sums:
    target = changed.items[0][1].target

    def stored() -> Tensor:
        assert reader is not None, "only with a base is there a delta that asks for its weights"
        matrix = stored_matrix(reader, target)
        return matrix[:, None] if matrix.dim() == 1 else matrix  # a norm's weight is a matrix of one column

    def weight() -> Tensor:
        matrix = stored().float()
        return matrix.T if target.transposed else matrix

    deltas: dict[int, list[Delta]] = {}
    for number, item in changed.items:
        deltas.setdefault(number, []).append(opened[number].delta(item, weight, lambda: None))
    found: dict[int, Update] = {}
    for number, own in deltas.items():
        change = update([(1.0, delta) for delta in own], transposed=target.transposed)
        if change is not None:
            found[number] = change
    inner = inner_products(list(found.values()), stored)
    if not torch.isfinite(inner).all():
        names = ", ".join(opened[number].expert.name for number in found)
        message = f"{names}: the delta of {changed.module} is too large to be computed with"
        raise InvalidFileError("weights-not-finite", message, where=changed.module)
    low = [spaces(change) for change in found.values()]
    if target.transposed:
        low = [Spaces(own.columns, own.rows) for own in low]
    return _sums(len(opened), list(found), list(deltas), inner, low, (changed.d_in, changed.d_out))


def _sums(
    count: int, numbers: list[int], owners: list[int], inner: Tensor, low: Sequence[Spaces], sides: tuple[int, int]
) -> Sums:
    """Put what was measured among all adapters.

    Args:
        count: E.
        numbers: Of the adapters that were measured.
        owners: Of those that change the matrix, were it by nothing.
        inner: (k, k), in the order of ``numbers``.
        low: Their subspaces.
        sides: d_in, d_out.
    """
    size = (count, count)
    every, squares, shared, most = (torch.zeros(size, dtype=torch.float64) for _ in range(4))
    near, chance = torch.zeros(2, *size, dtype=torch.float64), torch.zeros(2, *size, dtype=torch.float64)
    every[torch.tensor(numbers)[:, None], torch.tensor(numbers)] = inner
    is_owner = torch.zeros(count, dtype=torch.float64)
    is_owner[owners] = 1.0
    shared += is_owner[:, None] * is_owner
    squares += every.diagonal()[:, None] * is_owner
    for (one, first), (two, second) in combinations(zip(numbers, low, strict=True), 2):
        pair = torch.tensor([one, two]), torch.tensor([two, one])
        most[pair] = min(first.rank, second.rank)
        for side, d, mine, theirs in (
            (0, sides[0], first.rows, second.rows),
            (1, sides[1], first.columns, second.columns),
        ):
            near[side][pair] = nearness(mine, theirs)
            chance[side][pair] = first.rank * second.rank / d
    return Sums(1, every, squares, shared, near, chance, most)

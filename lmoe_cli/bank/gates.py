"""The numbers that say how strongly each expert acts, shared by all blended modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_force(gates: Tensor | Sequence[Sequence[float]] | Sequence[float], skip_below: float) -> Tensor:
    """Gates as they act, which is the same for a live, a folded and a baked blend.

    Args:
        gates: g, any shape.
        skip_below: Gates of a smaller magnitude act as 0; one that is equal counts. Compared in float32.

    Returns:
        The same shape, float32.
    """
    values = torch.as_tensor(gates, dtype=torch.float32)
    return torch.where(values.abs() < skip_below, 0.0, values)


class Gates:
    """One small tensor of gates, and what modules derive from it, computed once per change.

    Args:
        count: E, number of experts.
        device: Where the blended modules are.
        skip_below: See `in_force`.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu", skip_below: float = 0.0) -> None:
        self.values = torch.zeros(1, count, device=device)
        """g, (rows, E), float32; one row for the whole batch, or one for each of its rows."""
        self.skip_below = skip_below
        self._active: frozenset[int] = frozenset()
        self._derived: dict[Hashable, Any] = {}

    def set(self, values: Tensor | Sequence[Sequence[float]] | Sequence[float]) -> None:
        """Change the gates; the next forward uses them.

        Args:
            values: (E,), or (rows, E) where rows of a batch carry different blends.

        Raises:
            ValueError: Not a finite number per expert.
        """
        new = in_force(values, self.skip_below)
        new = new[None] if new.dim() == 1 else new
        if new.dim() != 2 or new.shape[1] != self.values.shape[1] or not torch.isfinite(new).all():
            raise ValueError(f"gates must be {self.values.shape[1]} finite numbers per row, got {values!r}")
        self._active = frozenset(new.any(dim=0).nonzero().flatten().tolist())
        self.values = new.to(self.values.device)
        self._derived.clear()

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    def is_active(self, experts: frozenset[int]) -> bool:
        """Whether any of these experts has a gate that counts."""
        return not self._active.isdisjoint(experts)

    def coefficients(self, layout: Hashable, owner: Tensor, dtype: torch.dtype) -> Tensor:
        """The gate of the expert that owns each row of a stacked A.

        Args:
            layout: Equal for stacks whose rows belong to the same experts in the same order.
            owner: Expert of each row, (R,), int64.
            dtype: Of the result.

        Returns:
            (rows, R).
        """
        return self.derived((layout, dtype), lambda: self.values[:, owner].to(dtype))

    def combine(self, key: Hashable, experts: Tensor, vectors: Tensor) -> Tensor:
        """The gated sum of one vector per expert.

        Args:
            key: Unique to these vectors.
            experts: Whose they are, (K,), int64.
            vectors: (K, n), float32.

        Returns:
            (rows, n), float32.
        """
        return self.derived(key, lambda: self.values[:, experts] @ vectors)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """Something computed from the gates, other than None, kept until they change."""
        found: T | None = self._derived.get(key)
        if found is None:
            found = self._derived[key] = make()
        return found

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Give each row of a batch its own values.

        Args:
            values: (rows, n).
            x: What they will be multiplied with or added to: (batch, ..., n), or flattened to (batch x tokens, n).

        Returns:
            A tensor that broadcasts against ``x``.

        Raises:
            ValueError: See `share`.
        """
        if values.shape[0] == 1:
            return values[0]
        each = values if (share := self.share(x)) == 1 else values.repeat_interleave(share, dim=0)
        return each.view(x.shape[0], *[1] * (x.dim() - 2), values.shape[1])

    def share(self, x: Tensor) -> int:
        """How many entries along the first side of ``x`` belong to each row of gates.

        Args:
            x: (batch, ..., n), or flattened to (batch x tokens, n).

        Raises:
            ValueError: The batch has not as many rows as the gates.
        """
        count, rest = divmod(x.shape[0], self.rows)
        if rest or not count or (count > 1 and x.dim() > 2 and self.rows > 1):
            raise ValueError(f"a batch of shape {tuple(x.shape)} cannot carry {self.rows} rows of gates")
        return count

"""The numbers that say how strongly each expert acts, shared by all blended modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MOST_DERIVED = 1 << 14
"""What is kept of things that were computed from gates."""


def in_force(gates: Tensor | Sequence[Any], skip_below: float) -> Tensor:
    """Gates as they act, which is the same for a live, a folded and a baked blend.

    Args:
        gates: g, any shape.
        skip_below: Gates of a smaller magnitude act as 0; one that is equal counts. Compared in float32.

    Returns:
        The same shape, float32.
    """
    values = torch.as_tensor(gates, dtype=torch.float32)
    return torch.where(values.abs() < skip_below, 0.0, values)


class Share(NamedTuple):
    """The vectors of a batch on which one expert acts."""

    expert: int
    vectors: Tensor | None
    """Their numbers in the flattened batch, (n,), int64; None for all of them."""
    gates: Tensor
    """g of each, (n, 1), or (1, 1) where it is the same for all; float32."""


class Gates:
    """One small tensor of gates, and what modules derive from it, computed once per change.

    Args:
        count: E, number of experts.
        device: Where the blended modules are.
        skip_below: See `in_force`.
    """

    reads_input = False
    """Whether modules hand over their inputs before they ask; see `lmoe_cli.bank.routed`."""

    def read(self, x: Tensor, asking: object = None) -> None:
        """Take note of what a module reads; these gates do not depend on it."""

    def __init__(self, count: int, device: torch.device | str = "cpu", skip_below: float = 0.0) -> None:
        self.count = count
        self.values = torch.zeros(1, count, device=device)
        """g, float32: (1, E) for the whole batch, (B, E) for each of its rows, or (B, T, E) for each of its tokens.
        Gates of the same shape are written into the same memory, so that a captured graph sees them change."""
        self.skip_below = skip_below
        self.version = 0
        """Goes up whenever the gates change."""
        self._active: frozenset[int] = frozenset()
        self._is_any_active = False
        self._owners: dict[tuple[Hashable, torch.dtype], Tensor] = {}
        self._owned: dict[tuple[Hashable, torch.dtype], Tensor] = {}
        self._derived: dict[Hashable, Any] = {}

    def set(self, values: Tensor | Sequence[Any]) -> None:
        """Change the gates; the next forward uses them.

        Args:
            values: (E,), or (B, E) where rows of a batch carry different blends, or (B, T, E) where its tokens do.
                A tensor that requires a gradient gets one.

        Raises:
            ValueError: Not a finite number per expert.
        """
        with torch.inference_mode(False):  # what is made here is written to again, whatever mode that happens in
            new = in_force(values, self.skip_below)
            new = new[None] if new.dim() == 1 else new
            if new.dim() not in (2, 3) or new.shape[-1] != self.count or not torch.isfinite(new).all():
                raise ValueError(f"gates must be {self.count} finite numbers per row or token, got {_told(values)}")
            self._active = frozenset(new.detach().flatten(0, -2).any(dim=0).nonzero().flatten().tolist())
            self._is_any_active = bool(self._active)
            self.version += 1
            self._derived.clear()
            if new.shape == self.values.shape and not (new.requires_grad or self.values.requires_grad):
                self.values.copy_(new)
                for key, coefficients in self._owned.items():
                    coefficients.copy_(self.values[..., self._owners[key]])
            else:
                self.values = new.to(self.values.device)
                self._owned.clear()
                if not (new.requires_grad or self.are_of_many_tokens):
                    self._owned.update({key: self._spread_over(owner, key[1]) for key, owner in self._owners.items()})

    @property
    def rows(self) -> int:
        """How many rows of a batch these gates are for; 1 also stands for any number of them."""
        return self.values.shape[0]

    @property
    def are_of_tokens(self) -> bool:
        """Whether each token has gates of its own."""
        return self.values.dim() == 3

    @property
    def are_of_many_tokens(self) -> bool:
        """Whether there are gates for each token of a prompt: as many numbers as an activation has."""
        return self.are_of_tokens and self.values.shape[1] > 1

    @property
    def are_same(self) -> bool:
        """Whether the whole batch has the same gates."""
        return self.values.shape[0] == 1 and self.values.dim() == 2

    def is_active(self, experts: frozenset[int]) -> bool:
        """Whether any of these experts has a gate that counts; to the compiler, whether any at all has one."""
        if torch.compiler.is_compiling():  # which would compile anew for each set of experts that is at rest
            return self._is_any_active
        return not self._active.isdisjoint(experts)

    @property
    def told(self) -> tuple[float, ...]:
        """All gates, one after the other."""
        return self.derived("told", lambda: (tuple(self.values.flatten().tolist()),))[0]

    @property
    def active(self) -> frozenset[int]:
        """Numbers of the experts that act anywhere."""
        return self._active

    @property
    def are_sparse(self) -> bool:
        """Whether some experts act on nothing, or on a part of the tokens."""
        return self.are_of_tokens or len(self._active) < self.count

    def coefficients(self, layout: Hashable, owner: Tensor, dtype: torch.dtype) -> Tensor:
        """The gate of the expert that owns each row of a stacked A.

        Kept, and from now on rewritten in its place whenever gates of the same shape are set, so that compiled code
        finds it; those of a prompt's tokens are made whenever they are asked for, since experts that are computed one
        by one do not need them.

        Args:
            layout: Equal for stacks whose rows belong to the same experts in the same order.
            owner: Expert of each row, (R,), int64.
            dtype: Of the result.

        Returns:
            As `values`, with R in place of E.
        """
        key = (layout, dtype)
        if key not in self._owners:
            self._owners[key] = owner
        if self.values.requires_grad or self.are_of_many_tokens:
            return self._spread_over(owner, dtype)
        found = self._owned.get(key)
        if found is None:
            with torch.inference_mode(False):  # to be written to by `set`, outside of any such mode
                found = self._owned[key] = self._spread_over(owner, dtype)
        return found

    def _spread_over(self, owner: Tensor, dtype: torch.dtype) -> Tensor:
        return self.values[..., owner].to(dtype)

    def combine(self, key: Hashable, experts: Tensor, vectors: Tensor) -> Tensor:
        """The gated sum of one vector per expert.

        Args:
            key: Unique to these vectors.
            experts: Whose they are, (K,), int64.
            vectors: (K, n), float32.

        Returns:
            As `values`, with n in place of E; float32.
        """
        if self.are_of_tokens or self.values.requires_grad:  # as large as activations: not kept
            return self.values[..., experts] @ vectors
        return self.derived(key, lambda: self.values[:, experts] @ vectors)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """Something computed from the gates, other than None, kept until they change."""
        if torch.compiler.is_compiling():
            return make()
        found: T | None = self._derived.get(key)
        if found is None:
            if len(self._derived) >= MOST_DERIVED:  # prompts of ever other lengths
                self._derived.clear()
            found = self._derived[key] = make()
        return found

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Give each row or token of a batch its own values.

        Args:
            values: (rows, n), or (B, T, n).
            x: What they will be multiplied with or added to: (batch, ..., n), or flattened to (batch x tokens, n).

        Returns:
            A tensor that broadcasts against ``x``.

        Raises:
            ValueError: See `share`.
        """
        if values.dim() == 3:
            if x.shape[:-1] not in (values.shape[:2], (values.shape[0] * values.shape[1],)):
                raise _unfit(x, f"gates for {values.shape[0]} x {values.shape[1]} tokens")
            return values.view(*x.shape[:-1], values.shape[-1])
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
            raise _unfit(x, f"{self.rows} rows of gates")
        return count

    def chosen(self) -> tuple[Tensor, Tensor] | None:
        """The experts of each token, where these are few: what kernels take that read no other expert.

        Returns:
            Numbers, (B x T, K), int64, and their gates, (B x T, K), float32; None where most experts act, and in
            compiled code, whose graph cannot depend on how many do.
        """
        if not self.are_of_tokens or torch.compiler.is_compiling():
            return None
        return self.derived("chosen", lambda: (self._chosen(),))[0]

    def _chosen(self) -> tuple[Tensor, Tensor] | None:
        each = self.values.flatten(0, 1)  # (N, E)
        kept = int((each != 0).sum(dim=1).max())
        if not 0 < 2 * kept <= each.shape[1]:
            return None
        experts = each.abs().topk(kept, dim=1).indices
        return experts, each.gather(1, experts)

    def shares(self, x: Tensor) -> tuple[Share, ...]:
        """Which experts act on which vectors, for those that act at all.

        Args:
            x: (batch, ..., n), or flattened to (batch x tokens, n).

        Raises:
            ValueError: See `spread`.
        """
        if self.values.requires_grad:
            return self._shares(x)
        return self.derived(("shares", x.shape[:-1]), lambda: self._shares(x))

    def _shares(self, x: Tensor) -> tuple[Share, ...]:
        active = sorted(self._active)
        if self.are_same:
            return tuple(Share(expert, None, self.values[:, expert, None]) for expert in active)
        each = self.spread(self.values, x).expand(*x.shape[:-1], -1).reshape(-1, self.count)  # (N, E)
        if each.shape[0] == 1:
            return tuple(Share(expert, None, each[:, expert, None]) for expert in active)
        expert_of, vectors = each.detach().T.nonzero(as_tuple=True)  # sorted by expert
        counts = torch.bincount(expert_of, minlength=each.shape[1]).tolist()
        found = zip(range(each.shape[1]), vectors.split(counts), strict=True)  # type: ignore[no-untyped-call]
        return tuple(Share(expert, own, each[own, expert, None]) for expert, own in found if len(own))


def _unfit(x: Tensor, gates: str) -> ValueError:
    return ValueError(f"a batch of shape {tuple(x.shape)} cannot carry {gates}")


def _told(values: Any) -> str:
    return f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)[:80]

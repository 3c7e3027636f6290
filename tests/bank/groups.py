"""Made-up groups of modules that share an input, and what a blend of them is, worked out in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmoe_cli.bank.fused.group import Chosen, Factors, Table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
ALLOWED = {torch.float32: 2e-6, torch.float16: 2.0**-11 + 2e-6, torch.bfloat16: 2.0**-8 + 2e-6}
"""Half of the space between two numbers, and what sums in float32 may lose, beside the sum's largest parts."""
if INTERPRETED:
    ALLOWED[torch.bfloat16] *= 2  # it cuts the digits off where a device rounds


@dataclass
class Group:
    """Members with experts on top. ``layouts`` holds expert and rank of each run of rows, member by member."""

    outs: tuple[int, ...]
    d_in: int
    layouts: tuple[tuple[tuple[int, int], ...], ...]
    dtype: torch.dtype = torch.float32
    biased: bool = True
    transposed: bool = False
    experts: int = 4
    seed: int = 0
    weights: list[Tensor] = field(init=False)
    biases: list[Tensor | None] = field(init=False)
    factors: Factors = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        ranks = [sum(rank for _, rank in layout) for layout in self.layouts]
        self.weights = [self.random(count, self.d_in) for count in self.outs]
        # One with and one without, so that a bias that is missing is seen.
        self.biases = [self.random(count) if self.biased and m != 1 else None for m, count in enumerate(self.outs)]
        b = [
            self.random(rank, count).T if self.transposed else self.random(count, rank)
            for count, rank in zip(self.outs, ranks, strict=True)
        ]
        starts = tuple(sum(ranks[:m]) for m in range(len(ranks)))
        self.factors = Factors(self.random(sum(ranks), self.d_in), tuple(b), starts)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(DEVICE, self.dtype)

    @property
    def owners(self) -> list[int]:
        return [expert for layout in self.layouts for expert, rank in layout for _ in range(rank)]

    def always(self, rows: int) -> Tensor:
        """Gates that are always on, per row of A."""
        return torch.randn(rows, self.experts)[:, self.owners].to(DEVICE)

    def chosen(self, batch: int, kept: int) -> Chosen:
        experts = torch.stack([torch.randperm(self.experts)[:kept] for _ in range(batch)]).to(DEVICE)
        gates = torch.randn(batch, kept).to(DEVICE)
        return Chosen(experts, gates, Table.of(self.layouts, self.experts, DEVICE))

    def spelled_out(self, chosen: Chosen) -> Tensor:
        """Gates of chosen experts as gates that are always on, most of them 0."""
        known = (chosen.experts >= 0) & (chosen.experts < self.experts)
        full = torch.zeros(len(chosen.experts), self.experts, device=DEVICE)
        full.scatter_add_(1, chosen.experts.long().where(known, 0), chosen.gates.float().where(known, 0.0))
        return full[:, self.owners]

    def products(self, x: Tensor) -> list[Tensor]:
        """What the base gives, rounded to its dtype."""
        return [torch.nn.functional.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]

    def formula(self, x: Tensor, gates: Tensor) -> list[tuple[Tensor, Tensor]]:
        """y of each member, and the same with every part of its sums taken positive."""
        return [
            (self._sum(x.double(), gates.double(), m), self._sum(x.double().abs(), gates.double().abs(), m, True))
            for m in range(len(self.outs))
        ]

    def _sum(self, x: Tensor, gates: Tensor, m: int, positive: bool = False) -> Tensor:
        def wide(tensor: Tensor) -> Tensor:
            return tensor.double().abs() if positive else tensor.double()

        b, start, bias = self.factors.b[m], self.factors.starts[m], self.biases[m]
        low = (x @ wide(self.factors.a).T) * gates.repeat_interleave(len(x) // len(gates), dim=0)
        y = x @ wide(self.weights[m]).T + low[:, start : start + b.shape[1]] @ wide(b).T
        return y if bias is None else y + wide(bias)

    def assert_is_formula(self, found: list[Tensor], x: Tensor, gates: Tensor, roundings: int = 1) -> None:
        """Compare with float64.

        Args:
            found: y of each member.
            x: The inputs.
            gates: Per row of A.
            roundings: How often a result was rounded to its dtype.
        """
        assert len(found) == len(self.outs)
        for y, (exact, size) in zip(found, self.formula(x, gates), strict=True):
            assert y.shape == exact.shape
            assert y.dtype == self.dtype
            due = ALLOWED[self.dtype] * exact.abs() if roundings == 1 else ALLOWED[self.dtype] * roundings * size
            excess = (y.double() - exact).abs() - due - 2e-6 * size
            assert excess.max().item() <= 0, f"off by {excess.max().item()} more than it may be"


PLAIN = {"outs": (37, 16, 5), "d_in": 101, "layouts": (((0, 3), (2, 8)), (), ((3, 1), (0, 5)))}
"""Sides that no block divides, a member without experts, experts of several ranks and some missing."""
GROUPS = {
    "plain": PLAIN,
    "transposed": {**PLAIN, "transposed": True, "biased": False},
    "alone": {"outs": (70,), "d_in": 64, "layouts": (((0, 16), (1, 16), (2, 16), (3, 16)),)},
    "wide": {"outs": (33, 7), "d_in": 1100, "layouts": (((1, 131),), ((0, 2), (1, 3)))},
    "nothing": {"outs": (9, 3), "d_in": 40, "layouts": ((), ())},
}

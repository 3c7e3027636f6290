"""The same calls as operators of PyTorch, so that torch.compile traces through modules that use them.

    torch.ops.lmoe.grouped, torch.ops.lmoe.behind                 gates that are always on
    torch.ops.lmoe.grouped_chosen, torch.ops.lmoe.behind_chosen   experts chosen per vector

They are opaque to the compiler, which keeps them in its graph as they are. They return new tensors, have no gradient
and do not wait for the device, so a CUDA graph can hold them once each has run for its shapes. Arguments are those of
`lmoe_cli.bank.fused.launch`, with `Factors`, `Chosen` and `Table` taken apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe_cli.bank.fused import launch
from lmoe_cli.bank.fused.group import Chosen, Factors, Table

BASE = "Tensor x, Tensor[] weights, Tensor?[] biases, "
PRODUCTS = "Tensor x, Tensor[] products, "
FACTORS = "Tensor a, Tensor[] b, int[] starts, "
GATES = "Tensor gates"
CHOSEN = "Tensor experts, Tensor gates, Tensor places, int max_rank"


@torch.library.custom_op("lmoe::grouped", mutates_args=(), schema=f"({BASE}{FACTORS}{GATES}) -> Tensor[]")
def grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    gates: Tensor,
) -> list[Tensor]:
    """See `launch.grouped`."""
    return launch.grouped(x, weights, biases, Factors(a, tuple(b), tuple(starts)), gates)


@torch.library.custom_op("lmoe::behind", mutates_args=(), schema=f"({PRODUCTS}{FACTORS}{GATES}) -> Tensor[]")
def behind(
    x: Tensor, products: Sequence[Tensor], a: Tensor, b: Sequence[Tensor], starts: Sequence[int], gates: Tensor
) -> list[Tensor]:
    """See `launch.behind`."""
    return launch.behind(x, products, Factors(a, tuple(b), tuple(starts)), gates)


@torch.library.custom_op("lmoe::grouped_chosen", mutates_args=(), schema=f"({BASE}{FACTORS}{CHOSEN}) -> Tensor[]")
def grouped_chosen(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    experts: Tensor,
    gates: Tensor,
    places: Tensor,
    max_rank: int,
) -> list[Tensor]:
    """See `launch.grouped` and `Chosen`."""
    chosen = Chosen(experts, gates, Table(places, max_rank))
    return launch.grouped(x, weights, biases, Factors(a, tuple(b), tuple(starts)), chosen)


@torch.library.custom_op("lmoe::behind_chosen", mutates_args=(), schema=f"({PRODUCTS}{FACTORS}{CHOSEN}) -> Tensor[]")
def behind_chosen(
    x: Tensor,
    products: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    experts: Tensor,
    gates: Tensor,
    places: Tensor,
    max_rank: int,
) -> list[Tensor]:
    """See `launch.behind` and `Chosen`."""
    chosen = Chosen(experts, gates, Table(places, max_rank))
    return launch.behind(x, products, Factors(a, tuple(b), tuple(starts)), chosen)


@grouped.register_fake
@grouped_chosen.register_fake
def _like_the_weights(x: Tensor, weights: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]


@behind.register_fake
@behind_chosen.register_fake
def _like_the_products(x: Tensor, products: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty(product.shape, dtype=product.dtype) for product in products]

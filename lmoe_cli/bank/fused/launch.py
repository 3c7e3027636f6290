"""Running the kernels of a group: where results lie, how the grid is cut."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lmoe_cli.bank.fused import tiles
from lmoe_cli.bank.fused.group import Chosen, Factors, check, check_matrix, words
from lmoe_cli.bank.fused.tiles import Tile


@cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels run there: on a CUDA device that knows bfloat16, where Triton is installed.

    Triton's interpreter, which runs them on CPU tensors, is for tests and does not count.
    """
    return (
        device.type == "cuda"
        and find_spec("triton") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def work_size(batch: int, factors: Factors, gates: Tensor | Chosen, with_base: bool) -> int:
    """How many float32 one call needs as a workspace.

    Args:
        batch: N.
        factors: Of the experts.
        gates: As in the call.
        with_base: Whether that is `grouped`, which puts the base's products there too.
    """
    if isinstance(gates, Chosen):
        low = gates.experts.numel() * len(factors.b) * gates.table.max_rank
    else:
        low = batch * factors.a.shape[0]
    return _aligned(low) + (sum(_aligned(batch * b.shape[0]) for b in factors.b) if with_base else 0)


def grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factors: Factors,
    gates: Tensor | Chosen,
    work: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Base and experts of all members in two launches.

    Args:
        x: (N, d_in), N up to `MAX_BATCH`, contiguous along d_in; in the dtype of W, A and B.
        weights: W of each member, (d_out, d_in), contiguous along d_in.
        biases: (d_out,), any float dtype, or None.
        factors: Of the experts.
        gates: Per row of A, (rows, R), float32 or the dtype of A, contiguous along R, where the rows divide N and each
            holds for as many vectors in a row; or the chosen experts.
        work: At least `work_size` float32, contiguous; made where it is not given. Its contents mean nothing.
        out: Where to put the results, each contiguous along d_out; made where it is not given.

    Returns:
        y of each member, (N, d_out), in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit.
    """
    check(x, factors, gates)
    if len(weights) != len(factors.b) or len(biases) != len(weights):
        raise ValueError(f"{len(factors.b)} members, but {len(weights)} weights and {len(biases)} biases")
    for weight, bias, b in zip(weights, biases, factors.b, strict=True):
        check_matrix("W", weight, (b.shape[0], x.shape[1]), x, x.dtype)
        if bias is not None and (bias.shape != b.shape[:1] or not bias.is_contiguous() or bias.device != x.device):
            raise ValueError(f"a bias must be ({b.shape[0]},), contiguous, on {x.device}, got {words(bias)}")
    low, partials = _workspace(x, factors, gates, work, True)
    y = _outputs(x, [x.dtype] * len(weights), factors, out)
    with _on(x):
        _down(x, factors, gates, low, weights, biases, partials)
        _up(x, factors, gates, low, partials, y)
    return y


def behind(
    x: Tensor,
    products: Sequence[Tensor],
    factors: Factors,
    gates: Tensor | Chosen,
    work: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Experts of all members, in two launches, on top of what the base gave.

    Args:
        x: As in `grouped`.
        products: W x + bias of each member, (N, d_out), any float dtype, contiguous along d_out.
        factors: As in `grouped`.
        gates: As in `grouped`.
        work: As in `grouped`.
        out: As in `grouped`; may be ``products`` themselves.

    Returns:
        y of each member, (N, d_out), in the dtype of its product.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit.
    """
    check(x, factors, gates)
    if len(products) != len(factors.b):
        raise ValueError(f"{len(factors.b)} members, but {len(products)} products")
    for product, b in zip(products, factors.b, strict=True):
        check_matrix("a product", product, (x.shape[0], b.shape[0]), x, None)
    low, _ = _workspace(x, factors, gates, work, False)
    y = _outputs(x, [product.dtype for product in products], factors, out)
    with _on(x):
        _down(x, factors, gates, low, (), (), ())
        _up(x, factors, gates, low, products, y)
    return y


def _down(
    x: Tensor,
    factors: Factors,
    gates: Tensor | Chosen,
    low: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    partials: Sequence[Tensor],
) -> None:
    batch, width = x.shape
    counts = [weight.shape[0] for weight in weights]
    # Chosen experts are taken vector by vector, so that the batch matters only to a base that comes along.
    together = batch if weights or isinstance(gates, Tensor) else 1
    slots = gates.experts.numel() * len(factors.b) if isinstance(gates, Chosen) else 1
    rank = gates.table.max_rank if isinstance(gates, Chosen) else factors.a.shape[0]
    tile = tiles.down(x.dtype, width, slots * rank + sum(counts), together)
    first, *others = accumulate([slots * _blocks(rank, tile), *(_blocks(count, tile) for count in counts)])
    vectors = (x, x.stride(0), batch, width, factors.a, factors.a.stride(0))
    rest = {
        "weights": tuple(weights),
        "weight_strides": tuple(weight.stride(0) for weight in weights),
        "biases": tuple(biases),
        "counts": tuple(counts),
        "partials": tuple(partials),
        "firsts": (first, *others),
        "members": len(weights),
        "tile_rows": tile.rows,
        "tile_batch": tile.batch,
        "tile_columns": tile.columns,
        **_options(tile),
    }
    grid = ((first, *others)[-1],)
    if isinstance(gates, Chosen):
        from lmoe_cli.bank.fused.chosen import down_chosen

        places, kept = gates.table.places, gates.experts.shape[1]
        which = {"kept": kept, "experts": places.shape[2], "siblings": len(factors.b), "max_rank": rank}
        down_chosen[grid](*vectors, gates.experts, gates.gates, places, low, **which, **rest)
    else:
        from lmoe_cli.bank.fused.always import down

        down[grid](*vectors, rank, gates, gates.stride(0), batch // gates.shape[0], low, **rest)


def _up(
    x: Tensor,
    factors: Factors,
    gates: Tensor | Chosen,
    low: Tensor,
    partials: Sequence[Tensor],
    outs: Sequence[Tensor],
) -> None:
    batch, counts = x.shape[0], [b.shape[0] for b in factors.b]
    ranks = [b.shape[1] for b in factors.b]
    if isinstance(gates, Chosen):
        tile = tiles.up(gates.table.max_rank, sum(counts), 1)
    else:
        tile = tiles.up(max(ranks), sum(counts), batch)
    firsts = (0, *accumulate(_blocks(count, tile) for count in counts))
    rest = {
        "starts": factors.starts,
        "bs": factors.b,
        "row_strides": tuple(b.stride(0) for b in factors.b),
        "column_strides": tuple(b.stride(1) for b in factors.b),
        "counts": tuple(counts),
        "partials": tuple(partials),
        "partial_strides": tuple(partial.stride(0) for partial in partials),
        "outs": tuple(outs),
        "out_strides": tuple(out.stride(0) for out in outs),
        "firsts": firsts,
        "members": len(counts),
        "tile_rows": tile.rows,
        "tile_columns": tile.columns,
        **_options(tile),
    }
    if isinstance(gates, Chosen):
        from lmoe_cli.bank.fused.chosen import up_chosen

        places, kept = gates.table.places, gates.experts.shape[1]
        which = {"kept": kept, "experts": places.shape[2], "max_rank": gates.table.max_rank}
        up_chosen[firsts[-1], batch](low, gates.experts, places, **which, **rest)
    else:
        from lmoe_cli.bank.fused.always import up

        up[(firsts[-1],)](low, factors.a.shape[0], batch, ranks=tuple(ranks), tile_batch=tile.batch, **rest)


def _workspace(
    x: Tensor, factors: Factors, gates: Tensor | Chosen, work: Tensor | None, with_base: bool
) -> tuple[Tensor, list[Tensor]]:
    """What `down` leaves for `up`: gated A x, and the base's products where they are taken."""
    batch = x.shape[0]
    size = work_size(batch, factors, gates, with_base)
    if work is None:
        work = torch.empty(size, dtype=torch.float32, device=x.device)
    elif work.dim() != 1 or work.numel() < size or work.dtype != torch.float32 or work.device != x.device:
        raise ValueError(f"the workspace must be {size} float32 on {x.device}, got {words(work)}")
    elif not work.is_contiguous():
        raise ValueError(f"the workspace must be contiguous, got {words(work)}")
    place = work_size(batch, factors, gates, False)
    partials = []
    for b in factors.b if with_base else ():
        partials.append(work[place : place + batch * b.shape[0]].view(batch, b.shape[0]))
        place += _aligned(batch * b.shape[0])
    return work, partials


def _outputs(x: Tensor, dtypes: Sequence[torch.dtype], factors: Factors, out: Sequence[Tensor] | None) -> list[Tensor]:
    shapes = [(x.shape[0], b.shape[0]) for b in factors.b]
    if out is None:
        return [x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    if len(out) != len(shapes):
        raise ValueError(f"{len(shapes)} members, but {len(out)} outputs")
    for own, shape, dtype in zip(out, shapes, dtypes, strict=True):
        check_matrix("an output", own, shape, x, dtype)
    return list(out)


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _blocks(rows: int, tile: Tile) -> int:
    return -(-rows // tile.rows)


def _aligned(count: int) -> int:
    """Rounded up, so that what follows in the workspace lies on 64 bytes."""
    return -(-count // 16) * 16


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever its tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

"""Kernels for gates that are always on: every expert acts on every vector.

`down` takes the inputs x to the rows of A and, where asked, of the base's own matrices; `up` takes what A gave to the
outputs. `lmoe_cli.bank.fused.launch` says what is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmoe_cli.bank.fused.products import bases, product, put


@triton.jit
def down(
    x: tl.tensor,
    x_stride: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    a: tl.tensor,
    a_stride: tl.tensor,
    rank: tl.tensor,
    gates: tl.tensor,
    gate_stride: tl.tensor,
    share: tl.tensor,
    low: tl.tensor,
    weights: tl.tuple,
    weight_strides: tl.tuple,
    biases: tl.tuple,
    counts: tl.tuple,
    partials: tl.tuple,
    firsts: tl.tuple,
    members: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_batch: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Gated A x of all experts, and W x + bias of the members that bring their matrices.

    Args:
        x: (batch, width).
        x_stride: From one vector to the next.
        batch: N.
        width: d_in.
        a: (rank, width).
        a_stride: Of its rows.
        rank: R of all members together.
        gates: Per vector or shared, and row of A: (batch / share, rank).
        gate_stride: Of its rows.
        share: How many vectors in a row use the same row of gates.
        low: Result, (batch, rank), float32, contiguous.
        weights: W of each member, (count, width).
        weight_strides: Of their rows.
        biases: (count,) or None for each member.
        counts: d_out of each.
        partials: Results, (batch, count), float32, contiguous.
        firsts: Blocks [0, firsts[0]) are A's, [firsts[m], firsts[m + 1]) member m's.
        members: M; 0 where the base's product is taken elsewhere.
        tile_rows: Rows of a block.
        tile_batch: See `product`.
        tile_columns: See `product`.
    """
    block = tl.program_id(0)
    if block < firsts[0]:
        rows = block * tile_rows + tl.arange(0, tile_rows)
        each = tl.arange(0, tile_batch)
        total = product(a, a_stride, 1, rows, rank, x, x_stride, batch, width, tile_batch, tile_columns)
        places = gates + (each // share).to(tl.int64)[None, :] * gate_stride + rows[:, None]
        inside = (rows < rank)[:, None] & (each < batch)[None, :]
        total *= tl.load(places, mask=inside, other=0.0).to(tl.float32)
        put(low, rank, rows, rank, batch, total, tile_batch)
    bases(
        block, x, x_stride, batch, width, weights, weight_strides, biases, counts, partials, firsts, members, tile_rows,
        tile_batch, tile_columns,
    )  # fmt: skip


@triton.jit
def up(
    low: tl.tensor,
    low_stride: tl.tensor,
    batch: tl.tensor,
    starts: tl.tuple,
    ranks: tl.tuple,
    bs: tl.tuple,
    row_strides: tl.tuple,
    column_strides: tl.tuple,
    counts: tl.tuple,
    partials: tl.tuple,
    partial_strides: tl.tuple,
    outs: tl.tuple,
    out_strides: tl.tuple,
    firsts: tl.tuple,
    members: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_batch: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """What the base gave plus B times what `down` gave, for all members.

    Args:
        low: (batch, R), float32.
        low_stride: Of its rows.
        batch: N.
        starts: First column of ``low`` that belongs to each member.
        ranks: How many do; 0 where a member has no experts.
        bs: B of each member, (count, rank), any strides.
        row_strides: Theirs.
        column_strides: Theirs.
        counts: d_out of each member.
        partials: What the base gave, (batch, count), any float dtype.
        partial_strides: Of their rows.
        outs: Results, (batch, count); may be the partials themselves.
        out_strides: Of their rows.
        firsts: Blocks [firsts[m], firsts[m + 1]) are member m's.
        members: M.
        tile_rows: Rows of a block.
        tile_batch: See `product`.
        tile_columns: See `product`.
    """
    block = tl.program_id(0)
    for m in tl.static_range(members):
        if (block >= firsts[m]) & (block < firsts[m + 1]):
            rows = (block - firsts[m]) * tile_rows + tl.arange(0, tile_rows)
            each = tl.arange(0, tile_batch)
            total = product(
                bs[m], row_strides[m], column_strides[m], rows, counts[m], low + starts[m], low_stride, batch, ranks[m],
                tile_batch, tile_columns,
            )  # fmt: skip
            places = partials[m] + each.to(tl.int64)[None, :] * partial_strides[m] + rows[:, None]
            inside = (rows < counts[m])[:, None] & (each < batch)[None, :]
            total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
            put(outs[m], out_strides[m], rows, counts[m], batch, total, tile_batch)

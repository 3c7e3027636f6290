"""Kernels for experts chosen per vector, on the device: what was not chosen is not read, and the host is not asked.

As `lmoe_cli.bank.fused.always`, with a table that says which rows of A, and columns of B, an expert has on each member.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmoe_cli.bank.fused.products import bases, product, put


@triton.jit
def _rows_of(
    choices: tl.tensor,
    place: tl.tensor,
    table: tl.tensor,
    m: tl.tensor,
    experts: tl.constexpr,
    members: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """First row of A, and rank, of a chosen expert on a member; rank 0 for a number that no expert has."""
    expert = tl.load(choices + place).to(tl.int32)
    known = (expert >= 0) & (expert < experts)
    start = tl.load(table + m * experts + expert, mask=known, other=0)
    rank = tl.load(table + (members + m) * experts + expert, mask=known, other=0)
    return start, rank


@triton.jit
def down_chosen(
    x: tl.tensor,
    x_stride: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    a: tl.tensor,
    a_stride: tl.tensor,
    choices: tl.tensor,
    gates: tl.tensor,
    table: tl.tensor,
    low: tl.tensor,
    weights: tl.tuple,
    weight_strides: tl.tuple,
    biases: tl.tuple,
    counts: tl.tuple,
    partials: tl.tuple,
    firsts: tl.tuple,
    kept: tl.constexpr,
    experts: tl.constexpr,
    siblings: tl.constexpr,
    max_rank: tl.constexpr,
    members: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_batch: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """As `down`, of the chosen experts only.

    Args:
        x: (batch, width).
        x_stride: From one vector to the next.
        batch: N.
        width: d_in.
        a: (R, width).
        a_stride: Of its rows.
        choices: Experts of each vector, (batch, kept), contiguous integers; one that is not in [0, experts) adds
            nothing.
        gates: Theirs, (batch, kept), contiguous.
        table: First row of A and rank per member and expert, (2, siblings, experts), int32.
        low: Result, (batch, kept, siblings, max_rank), float32; what is beyond an expert's rank is 0.
        weights: As in `down`, and so on to ``firsts``.
        weight_strides: See above.
        biases: See above.
        counts: See above.
        partials: See above.
        firsts: See above; A's blocks are those of each vector, choice and sibling in turn.
        kept: K.
        experts: E.
        siblings: Members that have columns in ``low``.
        max_rank: Of any expert on any member.
        members: M, how many bring their own matrices: all siblings or 0.
        tile_rows: Rows of a block.
        tile_batch: Of the base's product; the experts' is taken vector by vector.
        tile_columns: See `product`.
    """
    block = tl.program_id(0)
    if block < firsts[0]:
        blocks: tl.constexpr = (max_rank + tile_rows - 1) // tile_rows
        slot = block // blocks  # of (batch, kept, siblings)
        place = slot // siblings  # of (batch, kept)
        rows = (block % blocks) * tile_rows + tl.arange(0, tile_rows)
        start, rank = _rows_of(choices, place, table, slot % siblings, experts, siblings)
        # Where no row of the block is wanted, nothing is read.
        used = tl.where((block % blocks) * tile_rows < rank, width, 0)
        vector = x + (place // kept).to(tl.int64) * x_stride
        total = product(a + start.to(tl.int64) * a_stride, a_stride, 1, rows, rank, vector, 0, 1, used, 1, tile_columns)
        total *= tl.load(gates + place).to(tl.float32)
        put(low + slot * max_rank, 0, rows, max_rank, 1, total, 1)
    bases(
        block, x, x_stride, batch, width, weights, weight_strides, biases, counts, partials, firsts, members, tile_rows,
        tile_batch, tile_columns,
    )  # fmt: skip


@triton.jit
def up_chosen(
    low: tl.tensor,
    choices: tl.tensor,
    table: tl.tensor,
    starts: tl.tuple,
    bs: tl.tuple,
    row_strides: tl.tuple,
    column_strides: tl.tuple,
    counts: tl.tuple,
    partials: tl.tuple,
    partial_strides: tl.tuple,
    outs: tl.tuple,
    out_strides: tl.tuple,
    firsts: tl.tuple,
    kept: tl.constexpr,
    experts: tl.constexpr,
    max_rank: tl.constexpr,
    members: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """As `up`, with the columns of the chosen experts only; the second side of the grid goes over the batch.

    Args:
        low: From `down_chosen`.
        choices: As there.
        table: As there.
        starts: Row of A where the first column of each member's B belongs.
        bs: As in `up`, and so on to ``firsts``.
        row_strides: See above.
        column_strides: See above.
        counts: See above.
        partials: See above.
        partial_strides: See above.
        outs: See above.
        out_strides: See above.
        firsts: See above.
        kept: K.
        experts: E.
        max_rank: Of any expert on any member.
        members: M.
        tile_rows: Rows of a block.
        tile_columns: See `product`.
    """
    block, n = tl.program_id(0), tl.program_id(1)
    for m in tl.static_range(members):
        if (block >= firsts[m]) & (block < firsts[m + 1]):
            rows = (block - firsts[m]) * tile_rows + tl.arange(0, tile_rows)
            partial = partials[m] + n.to(tl.int64) * partial_strides[m]
            total = tl.load(partial + rows, mask=rows < counts[m], other=0.0).to(tl.float32)[:, None]
            for j in range(kept):
                place = n * kept + j
                start, rank = _rows_of(choices, place, table, m, experts, members)
                columns = bs[m] + (start - starts[m]).to(tl.int64) * column_strides[m]
                total += product(
                    columns, row_strides[m], column_strides[m], rows, counts[m],
                    low + (place * members + m) * max_rank, 0, 1, rank, 1, tile_columns,
                )  # fmt: skip
            put(outs[m] + n.to(tl.int64) * out_strides[m], 0, rows, counts[m], 1, total, 1)

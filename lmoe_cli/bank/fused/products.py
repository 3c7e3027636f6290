"""What the kernels have in common: rows of a matrix times a few vectors.

Every element of a result is summed by one program, in float32 and in an order that only the tile's size decides: there
are no atomics, and equal inputs give equal bits. Rows times strides are taken in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(
    matrix: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    vectors: tl.tensor,
    vector_stride: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    tile_batch: tl.constexpr,
    tile_columns: tl.constexpr,
) -> tl.tensor:
    """Some rows of a matrix times each of a few vectors.

    Args:
        matrix: (count, width), any strides.
        row_stride: Of the matrix.
        column_stride: Of the matrix.
        rows: Which rows, (tile_rows,); those from ``count`` on give 0.
        count: How many rows the matrix has.
        vectors: (batch, width), contiguous along the width; in the matrix's dtype or float32.
        vector_stride: From one vector to the next.
        batch: How many vectors.
        width: Of both; 0 gives 0.
        tile_batch: 1 where batch is 1; else at least 16, which is what a product of tiles takes.
        tile_columns: How much of the width is read at a time, at least 16.

    Returns:
        (tile_rows, tile_batch), float32.
    """
    # A product of float16 or bfloat16 with the float32 that A gave keeps its digits in three passes of the matrix unit.
    precision: tl.constexpr = "ieee" if matrix.dtype.element_ty == tl.float32 else "tf32x3"
    each = tl.arange(0, tile_batch)
    lanes = tl.arange(0, tile_columns)
    from_rows = matrix + rows.to(tl.int64)[:, None] * row_stride
    from_vectors = vectors + each.to(tl.int64)[:, None] * vector_stride
    total = tl.zeros((rows.shape[0], tile_columns if tile_batch == 1 else tile_batch), tl.float32)
    for start in range(0, width, tile_columns):
        columns = start + lanes
        inside = (columns < width)[None, :]
        places = from_rows + columns.to(tl.int64)[None, :] * column_stride
        factor = tl.load(places, mask=(rows < count)[:, None] & inside, other=0.0)  # (tile_rows, tile_columns)
        vector = tl.load(from_vectors + columns[None, :], mask=(each < batch)[:, None] & inside, other=0.0)
        if tile_batch == 1:
            total += factor.to(tl.float32) * vector.to(tl.float32)
        else:
            # The interpreter multiplies the bits of bfloat16 as if they were integers.
            if INTERPRETED or factor.dtype != vector.dtype:
                factor, vector = factor.to(tl.float32), vector.to(tl.float32)
            total = tl.dot(factor, tl.trans(vector), total, input_precision=precision)
    if tile_batch == 1:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def put(
    target: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    batch: tl.tensor,
    values: tl.tensor,
    tile_batch: tl.constexpr,
) -> None:
    """Store values (tile_rows, tile_batch) into a target (batch, count), rounded to its dtype."""
    each = tl.arange(0, tile_batch)
    places = target + each.to(tl.int64)[None, :] * stride + rows[:, None]
    inside = (rows < count)[:, None] & (each < batch)[None, :]
    tl.store(places, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def base_rows(
    block: tl.tensor,
    x: tl.tensor,
    x_stride: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    weight: tl.tensor,
    weight_stride: tl.tensor,
    bias: tl.tensor,
    count: tl.tensor,
    partial: tl.tensor,
    tile_rows: tl.constexpr,
    tile_batch: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """One block of rows of W x + bias, into partial (batch, count), float32, contiguous."""
    rows = block * tile_rows + tl.arange(0, tile_rows)
    total = product(
        weight, weight_stride, 1, rows, count, x, x_stride, batch, width, tile_batch, tile_columns
    )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < count, other=0.0).to(tl.float32)[:, None]
    put(partial, count, rows, count, batch, total, tile_batch)


@triton.jit
def bases(
    block: tl.tensor,
    x: tl.tensor,
    x_stride: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
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
    """The block of rows of that member whose blocks [firsts[m], firsts[m + 1]) hold it."""
    # One copy of the loop per member: a pointer picked at run time would lose what is known of its alignment, and with
    # it the wide loads.
    for m in tl.static_range(members):
        if (block >= firsts[m]) & (block < firsts[m + 1]):
            base_rows(
                block - firsts[m], x, x_stride, batch, width, weights[m], weight_strides[m], biases[m], counts[m],
                partials[m], tile_rows, tile_batch, tile_columns,
            )  # fmt: skip

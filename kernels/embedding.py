"""Rows of a table, gathered by index, and the sums of gradients that go back to each row.

Backward sorts the indices: what belongs to a row of the table is a run of sorted positions. Runs
may be of any length, so whole chunks of CHUNK positions that lie in one run are summed before.
"""

import triton
import triton.language as tl


@triton.jit
def embedding_fwd(
    weight_ptr, ids_ptr, y_ptr,
    n_ids, n_rows, n_cols, row_stride, col_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile of ROWS indices and BLOCK columns."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < n_ids)[:, None] & (cols < n_cols)[None, :]

    ids = tl.load(ids_ptr + at, mask=at < n_ids, other=0).to(tl.int64)
    # an index that the table does not have gives NaN
    known = ((ids >= 0) & (ids < n_rows))[:, None]
    from_ = ids[:, None] * row_stride + cols[None, :] * col_stride
    rows = tl.load(weight_ptr + from_, mask=inside & known, other=float("nan"))
    tl.store(y_ptr + at[:, None] * n_cols + cols[None, :], rows, mask=inside)


@triton.jit
def sum_rows(
    ptr, order_ptr, first, skip_from, skip, count, cols, n_cols,
    ROWS: tl.constexpr, POS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum, in fp32, of `count` rows for each of ROWS runs, POS of them at a time.

    A run begins at position `first` and jumps over `skip` positions at `skip_from`. Positions are
    looked up in the order, if there is one.
    """
    total = tl.zeros((ROWS, POS, BLOCK), dtype=tl.float32)
    for k in range(0, tl.max(count, axis=0), POS):
        steps = (k + tl.arange(0, POS))[None, :]
        inside = steps < count[:, None]
        at = first[:, None] + steps
        at = tl.where(at < skip_from[:, None], at, at + skip[:, None])
        if order_ptr is not None:
            at = tl.load(order_ptr + at, mask=inside, other=0)
        offsets = at.to(tl.int64)[:, :, None] * n_cols + cols[None, None, :]
        mask = inside[:, :, None] & (cols < n_cols)[None, None, :]
        total += tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit
def embedding_bwd_chunks(
    dy_ptr, ids_ptr, order_ptr, sums_ptr,
    n_cols, padding,
    CHUNK: tl.constexpr, POS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per chunk of sorted positions and block of columns. Leaves a sum where the chunk
    is of one index.
    """
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(ids_ptr + chunk * CHUNK)
    if (index == tl.load(ids_ptr + (chunk + 1) * CHUNK - 1)) & (index != padding):
        first = tl.zeros((1,), dtype=tl.int64) + chunk * CHUNK
        count = tl.full((1,), CHUNK, dtype=tl.int32)
        total = sum_rows(
            dy_ptr, order_ptr, first, first + CHUNK, first, count, cols, n_cols, 1, POS, BLOCK
        )
        mask = (cols < n_cols)[None, :]
        tl.store(sums_ptr + chunk * n_cols + cols[None, :], total, mask=mask)


@triton.jit
def embedding_bwd(
    dy_ptr, order_ptr, starts_ptr, sums_ptr, dweight_ptr,
    n_rows, n_cols, padding,
    BY_FREQ: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, POS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile of ROWS rows of the table and BLOCK columns. All rows are written."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = rows < n_rows
    first = tl.load(starts_ptr + rows, mask=here, other=0)
    last = tl.load(starts_ptr + rows + 1, mask=here, other=0)
    last = tl.where(rows == padding, first, last)

    count, skip, skip_from = last - first, tl.zeros_like(first), last
    if sums_ptr is not None:
        # chunks that lie in the run as a whole
        chunk, end = (first + CHUNK - 1) // CHUNK, last // CHUNK
        chunks = tl.where(end > chunk, end - chunk, 0)
        skip_from = tl.where(chunks > 0, chunk * CHUNK, last)
        skip = chunks * CHUNK
        total = sum_rows(sums_ptr, None, chunk, end, skip, chunks, cols, n_cols, ROWS, POS, BLOCK)
        total += sum_rows(
            dy_ptr, order_ptr, first, skip_from, skip, count - skip, cols, n_cols, ROWS, POS, BLOCK
        )
    else:
        total = sum_rows(
            dy_ptr, order_ptr, first, skip_from, skip, count, cols, n_cols, ROWS, POS, BLOCK
        )
    if BY_FREQ:
        total = total / tl.where(count > 0, count, 1).to(tl.float32)[:, None]
    mask = here[:, None] & (cols < n_cols)[None, :]
    tl.store(dweight_ptr + rows[:, None] * n_cols + cols[None, :], total, mask=mask)

"""Negative log likelihood: of each row of log-probabilities, minus the one of its class times the
weight of the class.
"""

import triton
import triton.language as tl

from .cross_entropy import load_index, row_offsets


@triton.jit
def nll_loss_fwd(
    x_ptr, target_ptr, weight_ptr, loss_ptr, row_weight_ptr,
    n_rows, n_cols, n_inner, x_outer, x_class, x_inner, ignore_index,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Each program has ROWS rows, of which it reads one element."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    index, kept, weight = load_index(target_ptr, weight_ptr, rows, inside, n_cols, ignore_index)
    known = kept & (index >= 0) & (index < n_cols)
    offsets = row_offsets(rows, n_inner, x_outer, x_inner) + index * x_class
    x = tl.load(x_ptr + offsets, mask=known, other=0.0).to(tl.float32)
    tl.store(loss_ptr + rows, tl.where(kept, -x * weight, 0.0), mask=inside)
    if row_weight_ptr is not None:
        tl.store(row_weight_ptr + rows, weight, mask=inside)


@triton.jit
def nll_loss_bwd(
    dloss_ptr, target_ptr, weight_ptr, sums_ptr, dx_ptr,
    n_rows, n_cols, n_inner, n_parts, dx_outer, dx_class, dx_inner, dloss_row, ignore_index,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows have n_parts programs, each of them with one block of classes."""
    rows = (tl.program_id(0) // n_parts) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (tl.program_id(0) % n_parts) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = rows < n_rows
    up = tl.load(dloss_ptr + rows * dloss_row, mask=inside, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        up /= tl.load(sums_ptr + 1)  # the mean's denominator
    index, _, weight = load_index(target_ptr, weight_ptr, rows, inside, n_cols, ignore_index)
    dx = tl.where(cols == index, -up * weight, 0.0)
    dx_ptrs = dx_ptr + row_offsets(rows, n_inner, dx_outer, dx_inner) + cols.to(tl.int64) * dx_class
    tl.store(dx_ptrs, dx, mask=inside & (cols < n_cols))

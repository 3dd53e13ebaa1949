"""Layer normalization of rows of h = x + residual, with factors of a group of rows:
y = ((h - mean) rstd weight + bias) (1 + scale) + shift.

RMS normalization is the same without mean and bias: a mean_ptr of None says so. Its weight is
weight + offset, and the normalized rows are rounded to the dtype of cast_ptr before they meet it.

A tile of whole rows stays in registers. Rows too long for that are in layernorm_wide.py.
"""

import triton
import triton.language as tl

from ._rows import load_columns, load_sum, load_tile, load_weight, rounded, row_mean


@triton.jit
def affine(
    x_hat, group, weight_ptr, bias_ptr, scale_ptr, shift_ptr, cols, n_cols, offset
):  # fmt: skip
    """Weight and bias, then scale and shift of the rows' group."""
    y = x_hat
    if weight_ptr is not None:
        y *= load_weight(weight_ptr, cols, n_cols, offset)
    if bias_ptr is not None:
        y += load_columns(bias_ptr, cols, n_cols)
    if scale_ptr is not None:
        y *= 1.0 + load_columns(scale_ptr + group * n_cols, cols, n_cols)
    if shift_ptr is not None:
        y += load_columns(shift_ptr + group * n_cols, cols, n_cols)
    return y


@triton.jit
def layernorm_fwd(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    y_ptr, h_ptr, mean_ptr, rstd_ptr, cast_ptr,
    x_row, n_cols, group_rows, n_parts, eps, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each group of rows has n_parts programs. Leaves mean and rstd, in fp32, for backward."""
    group = (tl.program_id(0) // n_parts).to(tl.int64)
    within = (tl.program_id(0) % n_parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = (group * group_rows + within)[:, None]
    in_group = (within < group_rows)[:, None]
    cols = tl.arange(0, BLOCK)
    mask = in_group & (cols < n_cols)[None, :]

    offsets = rows * n_cols + cols[None, :]
    h = load_sum(x_ptr, rows * x_row + cols[None, :], residual_ptr, offsets, mask)
    if h_ptr is not None:
        tl.store(h_ptr + offsets, h, mask=mask)
    centered = h
    if mean_ptr is not None:
        mean = row_mean(h, n_cols)
        centered = tl.where(mask, h - mean, 0.0)
    rstd = tl.rsqrt(row_mean(centered * centered, n_cols) + eps)
    x_hat = rounded(centered * rstd, cast_ptr)
    y = affine(x_hat, group, weight_ptr, bias_ptr, scale_ptr, shift_ptr, cols, n_cols, offset)

    tl.store(y_ptr + offsets, y, mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=in_group)
    tl.store(rstd_ptr + rows, rstd, mask=in_group)


@triton.jit
def layernorm_bwd(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, bias_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr,
    h_row, n_cols, group_rows, n_parts, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each group has n_parts programs, that take its tiles of rows in turn and leave a partial of
    each column sum.

    The sums are of dweight, of dbias where rows are centered, and of dscale and dshift where there
    is a scale, in this order.
    """
    group = (tl.program_id(0) // n_parts).to(tl.int64)
    part = tl.program_id(0) % n_parts
    cols = tl.arange(0, BLOCK)
    dweight = tl.zeros((1, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((1, BLOCK), dtype=tl.float32)
    dscale = tl.zeros((1, BLOCK), dtype=tl.float32)
    dshift = tl.zeros((1, BLOCK), dtype=tl.float32)
    for first in range(part * ROWS, group_rows, n_parts * ROWS):
        within = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        rows = (group * group_rows + within)[:, None]
        in_group = (within < group_rows)[:, None]
        mask = in_group & (cols < n_cols)[None, :]
        offsets = rows * n_cols + cols[None, :]

        # dy is 0 past the end of rows and columns, and with it all that is summed
        dy = load_tile(dy_ptr, offsets, mask)
        rstd = tl.load(rstd_ptr + rows, mask=in_group, other=0.0)
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=in_group, other=0.0)
        x_hat = (load_tile(h_ptr, rows * h_row + cols[None, :], mask) - mean) * rstd
        if scale_ptr is not None:
            normed = affine(x_hat, group, weight_ptr, bias_ptr, None, None, cols, n_cols, offset)
            dscale += tl.sum(dy * normed, axis=0)[None, :]
            dshift += tl.sum(dy, axis=0)[None, :]
            dy *= 1.0 + load_columns(scale_ptr + group * n_cols, cols, n_cols)
        dweight += tl.sum(dy * x_hat, axis=0)[None, :]
        dbias += tl.sum(dy, axis=0)[None, :]

        if dx_ptr is not None:
            g = dy if weight_ptr is None else dy * load_weight(weight_ptr, cols, n_cols, offset)
            g_mean = 0.0 if mean_ptr is None else row_mean(g, n_cols)
            dx = rstd * (g - g_mean - x_hat * row_mean(g * x_hat, n_cols))
            if dh_ptr is not None:
                dx += load_tile(dh_ptr, offsets, mask)
            tl.store(dx_ptr + offsets, dx, mask=mask)

    if sums_ptr is not None:
        store_sums(sums_ptr, dweight, dbias, dscale, dshift, mean_ptr, scale_ptr, cols, n_cols)


@triton.jit
def store_sums(sums_ptr, dweight, dbias, dscale, dshift, mean_ptr, scale_ptr, cols, n_cols):
    """Partial column sums of this program: [kind, program, column]."""
    inside = (cols < n_cols)[None, :]
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * n_cols + cols[None, :]
    stride = tl.num_programs(0).to(tl.int64) * n_cols
    tl.store(sums, dweight, mask=inside)
    if mean_ptr is not None:
        tl.store(sums + stride, dbias, mask=inside)
    if scale_ptr is not None:
        tl.store(sums + 2 * stride, dscale, mask=inside)
        tl.store(sums + 3 * stride, dshift, mask=inside)

"""Layer normalization of rows that do not fit in registers: loops over blocks of columns."""

import triton
import triton.language as tl

from ._rows import load_columns, load_sum, load_tile, merge_moments, rounded
from .layernorm import affine, store_sums


@triton.jit
def layernorm_wide_fwd(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    y_ptr, h_ptr, mean_ptr, rstd_ptr, cast_ptr,
    x_row, n_cols, group_rows, eps, offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: a pass for the moments, merged block by block, and one for y."""
    row = tl.program_id(0).to(tl.int64)
    group = row // group_rows
    x_ptr += row * x_row
    if residual_ptr is not None:
        residual_ptr += row * n_cols
    one = tl.zeros((1, 1), dtype=tl.int64)
    origin = tl.zeros((1, 1), dtype=tl.float32)
    if mean_ptr is not None:
        # moments of the distance from the first element: a mean far from 0 costs no digits
        origin = load_sum(x_ptr, one, residual_ptr, one, one == 0)
    mean = tl.zeros((1, 1), dtype=tl.float32)
    m2 = tl.zeros((1, 1), dtype=tl.float32)
    count = tl.zeros((1, 1), dtype=tl.float32)
    for first in range(0, n_cols, BLOCK):
        cols = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        mask = (cols < n_cols)[None, :]
        h = load_sum(x_ptr, cols[None, :], residual_ptr, cols[None, :], mask)
        if h_ptr is not None:
            tl.store(h_ptr + row * n_cols + cols[None, :], h, mask=mask)
        if mean_ptr is None:
            m2 += tl.sum(h * h, axis=1)[:, None]
        else:
            n_new = tl.cast(tl.minimum(n_cols - first, BLOCK), tl.float32)
            mean, m2, count = merge_moments(
                mean, m2, count, tl.where(mask, h - origin, 0.0), mask, n_new
            )
    rstd = tl.rsqrt(m2 / n_cols + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row + one, origin + mean)
    tl.store(rstd_ptr + row + one, rstd)

    for first in range(0, n_cols, BLOCK):
        cols = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        mask = (cols < n_cols)[None, :]
        # x and residual again, not h, which other threads of this program have written
        h = load_sum(x_ptr, cols[None, :], residual_ptr, cols[None, :], mask)
        x_hat = rounded((h - origin - mean) * rstd, cast_ptr)
        y = affine(x_hat, group, weight_ptr, bias_ptr, scale_ptr, shift_ptr, cols, n_cols, offset)
        tl.store(y_ptr + row * n_cols + cols[None, :], y, mask=mask)


@triton.jit
def layernorm_wide_dx(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr,
    h_row, n_cols, group_rows, offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: a pass for the two row means, and one for dx."""
    row = tl.program_id(0).to(tl.int64)
    group = row // group_rows
    mean = 0.0 if mean_ptr is None else tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    g_sum = tl.zeros((1, BLOCK), dtype=tl.float32)
    g_x_hat_sum = tl.zeros((1, BLOCK), dtype=tl.float32)
    for first in range(0, n_cols, BLOCK):
        cols = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        mask = (cols < n_cols)[None, :]
        # g is 0 past the end, so neither sum needs the mask
        g = load_tile(dy_ptr + row * n_cols, cols[None, :], mask)
        g = affine(g, group, weight_ptr, None, scale_ptr, None, cols, n_cols, offset)
        x_hat = (load_tile(h_ptr + row * h_row, cols[None, :], mask) - mean) * rstd
        g_sum += g
        g_x_hat_sum += g * x_hat
    g_mean = 0.0 if mean_ptr is None else tl.sum(g_sum) / n_cols
    g_x_hat_mean = tl.sum(g_x_hat_sum) / n_cols
    for first in range(0, n_cols, BLOCK):
        cols = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        mask = (cols < n_cols)[None, :]
        g = load_tile(dy_ptr + row * n_cols, cols[None, :], mask)
        g = affine(g, group, weight_ptr, None, scale_ptr, None, cols, n_cols, offset)
        x_hat = (load_tile(h_ptr + row * h_row, cols[None, :], mask) - mean) * rstd
        dx = rstd * (g - g_mean - x_hat * g_x_hat_mean)
        if dh_ptr is not None:
            dx += load_tile(dh_ptr + row * n_cols, cols[None, :], mask)
        tl.store(dx_ptr + row * n_cols + cols[None, :], dx, mask=mask)


@triton.jit
def layernorm_wide_sums(
    dy_ptr, h_ptr, weight_ptr, bias_ptr, scale_ptr, mean_ptr, rstd_ptr, sums_ptr,
    h_row, n_cols, group_rows, n_parts, offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The column sums of layernorm_bwd, for one block of columns; rows of a group go to its n_parts
    programs in turn.
    """
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = (tl.program_id(0) // n_parts).to(tl.int64)
    inside = (cols < n_cols)[None, :]
    dweight = tl.zeros((1, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((1, BLOCK), dtype=tl.float32)
    dscale = tl.zeros((1, BLOCK), dtype=tl.float32)
    dshift = tl.zeros((1, BLOCK), dtype=tl.float32)
    for within in range(tl.program_id(0) % n_parts, group_rows, n_parts):
        row = group * group_rows + within
        dy = load_tile(dy_ptr + row * n_cols, cols[None, :], inside)
        x_hat = load_tile(h_ptr + row * h_row, cols[None, :], inside)
        mean = 0.0 if mean_ptr is None else tl.load(mean_ptr + row)
        x_hat = (x_hat - mean) * tl.load(rstd_ptr + row)
        if scale_ptr is not None:
            normed = affine(x_hat, group, weight_ptr, bias_ptr, None, None, cols, n_cols, offset)
            dscale += dy * normed
            dshift += dy
            dy *= 1.0 + load_columns(scale_ptr + group * n_cols, cols, n_cols)
        dweight += dy * x_hat
        dbias += dy

    store_sums(sums_ptr, dweight, dbias, dscale, dshift, mean_ptr, scale_ptr, cols, n_cols)

"""What ends a product, in registers or in one pass over it: scale and bias, residual, activation,
dropout.

A tensor is images of M rows and N columns. Rows follow one another in memory, or columns do: then
it is planes, as in NCHW, where a column is a channel.
"""

import triton
import triton.language as tl

from ._math import activate, derivative
from ._rng import dropout


@triton.jit
def offsets_of(image, rows, cols, M, N, PLANES: tl.constexpr):
    """Where elements [image, row, column] are. `image` is a number, or one for each row, in a
    column.
    """
    if PLANES:
        within = rows[:, None] + cols[None, :] * tl.cast(M, tl.int64)
    else:
        within = rows[:, None] * tl.cast(N, tl.int64) + cols[None, :]
    return image * (tl.cast(M, tl.int64) * N) + within


@triton.jit
def finish(
    z, offsets, mask, rows, first_col, residual_ptr, seed_ptr, y_ptr, z_ptr,
    a, b, p,
    ACT: tl.constexpr, INSIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Finish a tile of z in registers. The residual is added INSIDE of the activation, or after
    dropout.
    """
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if INSIDE:
            z += residual
    if z_ptr is not None:
        tl.store(z_ptr + offsets, z, mask=mask)
    y = activate(z, ACT, a, b)
    if seed_ptr is not None:
        y = dropout(y, seed_ptr, rows[:, None], first_col, p, BLOCK_N)
    if residual_ptr is not None:
        if not INSIDE:
            y += residual
    tl.store(y_ptr + offsets, y, mask=mask)


@triton.jit
def with_bias(z, scale_ptr, bias_ptr, cols, mask):
    """z scale + bias, numbers of the columns."""
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def finish_fwd(
    partial_ptr, scale_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, z_ptr,
    n_images, M, N, n_parts, a, b, p,
    ACT: tl.constexpr, INSIDE: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the slices of a product, in a fixed order, and finish it."""
    n_cols, n_rows = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0).to(tl.int64)
    first_col = tile % n_cols * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    rows = tile // n_cols % n_rows * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tile // n_cols // n_rows
    mask = (rows < M)[:, None] & (cols < N)[None, :]

    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in range(n_parts):
        offsets = offsets_of(tl.cast(part, tl.int64) * n_images + image, rows, cols, M, N, PLANES)
        z += tl.load(partial_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    finish(
        with_bias(z, scale_ptr, bias_ptr, cols, cols < N),
        offsets_of(image, rows, cols, M, N, PLANES), mask,
        rows, first_col, residual_ptr, seed_ptr, y_ptr, z_ptr,
        a, b, p,
        ACT, INSIDE, BLOCK_N,
    )  # fmt: skip


@triton.jit
def finish_bwd(
    dy_ptr, z_ptr, seed_ptr, dz_ptr, dbias_ptr,
    n_images, M, N, a, b, p,
    ACT: tl.constexpr, PLANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz = act'(z) dropout(dy). A program takes every P-th row block of one column block and leaves
    a partial dbias.
    """
    first_col = tl.program_id(0).to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    n_rows = tl.cdiv(M, BLOCK_M)

    # a plane is long, and its sum is taken once
    total = tl.zeros((BLOCK_M, BLOCK_N) if PLANES else (BLOCK_N,), dtype=tl.float32)
    for block in range(part, n_images * n_rows, tl.num_programs(1)):
        rows = tl.cast(block % n_rows, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        offsets = offsets_of(tl.cast(block // n_rows, tl.int64), rows, cols, M, N, PLANES)

        # dy is 0 past the end, so the sum over rows needs no mask
        dz = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            dz = dropout(dz, seed_ptr, rows[:, None], first_col, p, BLOCK_N)
        if ACT != "none":
            z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dz *= derivative(z, ACT, a, b)
        tl.store(dz_ptr + offsets, dz, mask=mask)
        if dbias_ptr is not None:
            total += dz if PLANES else tl.sum(dz, axis=0)
    if dbias_ptr is not None:
        dbias = tl.sum(total, axis=0) if PLANES else total
        tl.store(dbias_ptr + part.to(tl.int64) * N + cols, dbias, mask=cols < N)

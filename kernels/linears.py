"""Linear layers of one input: y_i = x @ weight_i.T + bias_i, for up to three weights.

A column of tiles belongs to one weight, and comes after the columns of the weights before it.
Where there is no third weight, N2 is 0 and its pointers are those of another.
"""

import triton
import triton.language as tl

from .finish import with_bias
from .linear import product, product_of_descriptors, split, tile_of


@triton.jit
def n_blocks(N0, N1, N2, BLOCK_N: tl.constexpr):
    """Columns of tiles."""
    return tl.cdiv(N0, BLOCK_N) + tl.cdiv(N1, BLOCK_N) + tl.cdiv(N2, BLOCK_N)


@triton.jit
def weight_of(block, N0, N1, BLOCK_N: tl.constexpr):
    """Which weight a column of tiles belongs to, and its number among those of the weight."""
    n0, n1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    which = (block >= n0).to(tl.int32) + (block >= n0 + n1).to(tl.int32)
    return which, block - pick(which, 0, n0, n0 + n1)


@triton.jit
def pick(which, first, second, third):
    return tl.where(which == 0, first, tl.where(which == 1, second, third))


@triton.jit
def store(
    z, which, rows, first_col, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr,
    M, N0, N1, N2, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the bias, where this weight has one, and store a tile of its output."""
    N = pick(which, N0, N1, N2)
    cols = first_col + tl.arange(0, BLOCK_N)
    inside = cols < N
    z = with_bias(z, None, b0_ptr, cols, inside & (which == 0))
    z = with_bias(z, None, b1_ptr, cols, inside & (which == 1))
    z = with_bias(z, None, b2_ptr, cols, inside & (which == 2))
    y_ptr = pick(which, y0_ptr, y1_ptr, y2_ptr)
    offsets = rows[:, None] * N + cols[None, :]
    tl.store(y_ptr + offsets, z, mask=(rows < M)[:, None] & inside[None, :])


@triton.jit
def linears_fwd(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr, partial_ptr,
    M, N0, N1, N2, K, x_row, w_row,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """One program per tile of the outputs and slice of K. Of several slices each leaves an fp32
    sum, in rows that hold those of all outputs.
    """
    n_cols = n_blocks(N0, N1, N2, BLOCK_N)
    block_m, block_n = tile_of(tl.program_id(0), M, n_cols * BLOCK_N, BLOCK_M, BLOCK_N, GROUP)
    which, block_n = weight_of(block_n, N0, N1, BLOCK_N)
    part = tl.program_id(1)
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = block_n.to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    N = pick(which, N0, N1, N2)

    acc = product(
        x_ptr, pick(which, w0_ptr, w1_ptr, w2_ptr), rows, cols, part, M, N, K, x_row, w_row,
        PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
    )  # fmt: skip
    if partial_ptr is not None:
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        row = (part.to(tl.int64) * M + rows) * (N0 + N1 + N2) + pick(which, 0, N0, N0 + N1)
        tl.store(partial_ptr + row[:, None] + cols[None, :], acc, mask=mask)
    else:
        store(
            acc, which, rows, first_col, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr,
            M, N0, N1, N2, BLOCK_N,
        )  # fmt: skip


@triton.jit
def linears_finish(
    partial_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr,
    M, N0, N1, N2, n_parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the slices of the products, in a fixed order."""
    n_cols = n_blocks(N0, N1, N2, BLOCK_N)
    which, block_n = weight_of(tl.program_id(0) % n_cols, N0, N1, BLOCK_N)
    first_col = block_n.to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    rows = (tl.program_id(0) // n_cols).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < M)[:, None] & (cols < pick(which, N0, N1, N2))[None, :]

    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in range(n_parts):
        row = (tl.cast(part, tl.int64) * M + rows) * (N0 + N1 + N2) + pick(which, 0, N0, N0 + N1)
        z += tl.load(partial_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0)
    store(
        z, which, rows, first_col, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr,
        M, N0, N1, N2, BLOCK_N,
    )  # fmt: skip


@triton.jit
def linears_persistent(
    x_desc, w0_desc, w1_desc, w2_desc, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr,
    M, N0, N1, N2, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As many programs as processors take tiles in turn, through tensor descriptors (TMA)."""
    n_cols = n_blocks(N0, N1, N2, BLOCK_N)
    n_tiles = tl.cdiv(M, BLOCK_M) * n_cols
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        block_m, block_n = tile_of(tile, M, n_cols * BLOCK_N, BLOCK_M, BLOCK_N, GROUP)
        which, block_n = weight_of(block_n, N0, N1, BLOCK_N)
        if which == 0:
            w_desc = w0_desc
        elif which == 1:
            w_desc = w1_desc
        else:
            w_desc = w2_desc
        acc = product_of_descriptors(x_desc, w_desc, block_m, block_n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        first_col = block_n.to(tl.int64) * BLOCK_N
        # by quarters, as in linear_persistent
        halves = split(acc, BLOCK_M, BLOCK_N)
        for i in tl.static_range(4):
            quarter = split(halves[i // 2], BLOCK_M, BLOCK_N // 2)[i % 2]
            store(
                quarter, which, rows, first_col + i * (BLOCK_N // 4),
                b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr,
                M, N0, N1, N2, BLOCK_N // 4,
            )  # fmt: skip

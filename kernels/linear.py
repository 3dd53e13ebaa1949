"""Linear layers: y = dropout(act(x @ weight.T + bias)) + residual, with z = x @ weight.T + bias
kept for backward.
"""

import triton
import triton.language as tl

from .finish import finish, with_bias


@triton.jit
def tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column block of a tile. GROUP row blocks in turn share columns of weight in L2."""
    n_cols = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * n_cols) * GROUP
    size = min(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = tile % (GROUP * n_cols)
    return first + within % size, within // size


@triton.jit
def split(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile. In the layout of wgmma nothing moves."""
    return tile.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def epilogue(
    z, rows, first_col, scale_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, z_ptr,
    M, N, a, b, p,
    ACT: tl.constexpr, INSIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Finish a tile of z in registers: scale, bias, activation, dropout, residual."""
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    finish(
        with_bias(z, scale_ptr, bias_ptr, cols, cols < N), offsets, mask,
        rows, first_col, residual_ptr, seed_ptr, y_ptr, z_ptr,
        a, b, p,
        ACT, INSIDE, BLOCK_N,
    )  # fmt: skip


@triton.jit
def product(
    x_ptr, weight_ptr, rows, cols, part, M, N, K, x_row, w_row,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """A tile of x @ weight.T over one slice of K."""
    ks = part.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    step = tl.num_programs(1).to(tl.int64) * BLOCK_K

    x_ptrs = x_ptr + rows[:, None] * x_row + ks[None, :]
    w_ptrs = weight_ptr + cols[:, None] * w_row + ks[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(part * BLOCK_K, K, tl.num_programs(1) * BLOCK_K):
        in_k = (ks < K)[None, :] if not EVEN_K else True
        # zeros past the end of K add nothing; rows and columns past the end are never stored
        x = tl.load(x_ptrs, mask=(rows < M)[:, None] & in_k, other=0.0)
        w = tl.load(w_ptrs, mask=(cols < N)[:, None] & in_k, other=0.0)
        if SWAP:
            acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        x_ptrs += step
        w_ptrs += step
        ks += step

    return acc.T if SWAP else acc


@triton.jit
def linear_fwd(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, z_ptr, partial_ptr,
    M, N, K, x_row, w_row, a, b, p,
    ACT: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """One program per tile of y and slice of K. Of several slices each leaves an fp32 sum."""
    block_m, block_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    part = tl.program_id(1)
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = product(
        x_ptr, weight_ptr, rows, cols, part, M, N, K, x_row, w_row,
        PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
    )  # fmt: skip
    if partial_ptr is not None:
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(
            partial_ptr + (part.to(tl.int64) * M + rows)[:, None] * N + cols[None, :],
            acc,
            mask=mask,
        )
    else:
        epilogue(
            acc, rows, block_n.to(tl.int64) * BLOCK_N,
            scale_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, z_ptr,
            M, N, a, b, p,
            ACT, INSIDE, BLOCK_N,
        )  # fmt: skip


@triton.jit
def product_of_descriptors(
    x_desc, weight_desc, block_m, block_n, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x @ weight.T through tensor descriptors."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([block_m * BLOCK_M, k])
        w = weight_desc.load([block_n * BLOCK_N, k])
        acc = tl.dot(x, w.T, acc)
    return acc


@triton.jit
def linear_persistent(
    x_desc, weight_desc, scale_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, z_ptr,
    M, N, K, a, b, p,
    ACT: tl.constexpr, INSIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As many programs as processors take tiles in turn, through tensor descriptors (TMA)."""
    n_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        block_m, block_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = product_of_descriptors(
            x_desc, weight_desc, block_m, block_n, K, BLOCK_M, BLOCK_N, BLOCK_K
        )
        rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        first_col = block_n.to(tl.int64) * BLOCK_N
        # by quarters: bias and activation of a whole tile do not fit in registers beside it
        halves = split(acc, BLOCK_M, BLOCK_N)
        for i in tl.static_range(4):
            quarter = split(halves[i // 2], BLOCK_M, BLOCK_N // 2)[i % 2]
            epilogue(
                quarter, rows, first_col + i * (BLOCK_N // 4),
                scale_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, z_ptr,
                M, N, a, b, p,
                ACT, INSIDE, BLOCK_N // 4,
            )  # fmt: skip

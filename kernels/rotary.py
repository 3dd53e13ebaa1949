"""Rotary embedding: each pair (a, b) of a row turns into (a cos - b sin, b cos + a sin).

A pair is an element of the first half of a row and its fellow of the second, or two neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def load_pairs(
    ptr, rows, col_stride, inside, other,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pairs of each row in fp32, as two tiles."""
    pairs = tl.program_id(1).to(tl.int64) * BLOCK
    if INTERLEAVED:
        cols = (2 * pairs + tl.arange(0, 2 * BLOCK))[None, :]
        both = tl.load(ptr + rows + cols * col_stride, mask=inside & (cols < D), other=other)
        a, b = tl.split(both.to(tl.float32).reshape(rows.shape[0], BLOCK, 2))
        return a, b
    cols = (pairs + tl.arange(0, BLOCK))[None, :]
    mask = inside & (cols < D // 2)
    a = tl.load(ptr + rows + cols * col_stride, mask=mask, other=other)
    b = tl.load(ptr + rows + (cols + D // 2) * col_stride, mask=mask, other=other)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(
    ptr, rows, col_stride, inside, a, b,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The opposite of load_pairs."""
    pairs = tl.program_id(1).to(tl.int64) * BLOCK
    if INTERLEAVED:
        cols = (2 * pairs + tl.arange(0, 2 * BLOCK))[None, :]
        both = tl.join(a, b).reshape(a.shape[0], 2 * BLOCK)
        tl.store(ptr + rows + cols * col_stride, both, mask=inside & (cols < D))
    else:
        cols = (pairs + tl.arange(0, BLOCK))[None, :]
        mask = inside & (cols < D // 2)
        tl.store(ptr + rows + cols * col_stride, a, mask=mask)
        tl.store(ptr + rows + (cols + D // 2) * col_stride, b, mask=mask)


@triton.jit
def rotary(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr,
    n_tokens, n_inner, n_heads, n_rows,
    x_outer, x_inner, x_head, x_col,
    y_outer, y_inner, y_head, y_col,
    at_outer, at_inner, row_stride,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS tokens and HEADS of their heads, which have angles in common.

    Forward turns by the angles, backward (TRANSPOSED) by the transposed matrix. Tokens are counted
    by two loops, outer and inner.
    """
    groups = tl.cdiv(n_heads, HEADS)
    tile = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * HEADS
    tokens = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    inside = tokens < n_tokens
    outer, inner = tokens // n_inner, tokens % n_inner

    rows, known = outer * at_outer + inner * at_inner, inside
    if positions_ptr is not None:
        at = tl.load(positions_ptr + rows, mask=inside, other=0).to(tl.int64)
        at = tl.where(at < 0, at + n_rows, at)
        known &= (at >= 0) & (at < n_rows)
        rows = at * row_stride
    # a position that the tables do not have gives NaN
    nan = float("nan")
    cos_a, cos_b = load_pairs(cos_ptr, rows, 1, known, nan, D, INTERLEAVED, BLOCK)
    sin_a, sin_b = load_pairs(sin_ptr, rows, 1, known, nan, D, INTERLEAVED, BLOCK)
    to_a, to_b = (sin_b, -sin_a) if TRANSPOSED else (-sin_a, sin_b)

    for h in range(first, tl.minimum(first + HEADS, n_heads)):
        head = tl.cast(h, tl.int64)
        x_rows = outer * x_outer + inner * x_inner + head * x_head
        y_rows = outer * y_outer + inner * y_inner + head * y_head
        a, b = load_pairs(x_ptr, x_rows, x_col, inside, 0.0, D, INTERLEAVED, BLOCK)
        store_pairs(
            y_ptr, y_rows, y_col, inside, a * cos_a + b * to_a, b * cos_b + a * to_b,
            D, INTERLEAVED, BLOCK,
        )  # fmt: skip

"""Softmax of rows that do not fit in registers: loops over blocks of columns."""

import triton
import triton.language as tl

from .softmax import (
    columns,
    input_gradient,
    load_gradient,
    load_logits,
    mask_rows,
    normalized,
    place,
)


@triton.jit
def softmax_wide_fwd(
    x_ptr, mask_ptr, y_ptr,
    x_outer, x_n, x_inner, y_n, y_inner, m_outer, m_n, m_a, m_b, m_c, size_b, size_c,
    n, inner, scale, fill,
    LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per few rows: a pass for maximum and sum, and one for y, backwards: what was read
    last is in the cache.
    """
    outer, rows, in_rows = place(inner, ROWS)
    x_rows = outer * x_outer + rows * x_inner
    m_rows = mask_rows(outer, rows, m_outer, m_a, m_b, m_c, size_b, size_c)
    largest = tl.full((ROWS, 1), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, n, BLOCK):
        cols, in_cols = columns(first, n, BLOCK)
        s = load_logits(
            x_ptr, x_rows + cols * x_n, mask_ptr, m_rows + cols * m_n, in_rows, in_cols, scale, fill
        )  # fmt: skip
        new = tl.maximum(largest, tl.max(s, axis=1)[:, None])
        # as long as all is -inf, exp counts from 0
        origin = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(largest - origin) + tl.exp(s - origin)
        largest = new
    total = tl.sum(sums, axis=1)[:, None]

    y_rows = outer * n * inner + rows * y_inner
    last = (n - 1) // BLOCK * BLOCK
    for back in range(0, n, BLOCK):
        cols, in_cols = columns(last - back, n, BLOCK)
        s = load_logits(
            x_ptr, x_rows + cols * x_n, mask_ptr, m_rows + cols * m_n, in_rows, in_cols, scale, fill
        )  # fmt: skip
        y = normalized(s, largest, total, LOG)
        tl.store(y_ptr + y_rows + cols * y_n, y, mask=in_rows & in_cols)


@triton.jit
def softmax_wide_bwd(
    dy_ptr, y_ptr, keep_ptr, dx_ptr,
    dy_outer, dy_n, dy_inner, y_n, y_inner, m_outer, m_n, m_a, m_b, m_c, size_b, size_c,
    n, inner, scale,
    LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per few rows: a pass for the sum, and one for dx, backwards."""
    outer, rows, in_rows = place(inner, ROWS)
    dy_rows = outer * dy_outer + rows * dy_inner
    y_rows = outer * n * inner + rows * y_inner
    m_rows = mask_rows(outer, rows, m_outer, m_a, m_b, m_c, size_b, size_c)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, n, BLOCK):
        cols, in_cols = columns(first, n, BLOCK)
        inside = in_rows & in_cols
        _, _, terms = load_gradient(
            dy_ptr, dy_rows + cols * dy_n, y_ptr, y_rows + cols * y_n, inside, LOG
        )
        sums += terms
    total = tl.sum(sums, axis=1)[:, None]

    last = (n - 1) // BLOCK * BLOCK
    for back in range(0, n, BLOCK):
        cols, in_cols = columns(last - back, n, BLOCK)
        inside = in_rows & in_cols
        dy, p, _ = load_gradient(
            dy_ptr, dy_rows + cols * dy_n, y_ptr, y_rows + cols * y_n, inside, LOG
        )
        dx = input_gradient(dy, p, total, keep_ptr, m_rows + cols * m_n, inside, scale, LOG)
        tl.store(dx_ptr + y_rows + cols * y_n, dx, mask=inside)

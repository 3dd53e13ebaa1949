"""Softmax of s = x scale + mask, or its logarithm. A boolean mask is True where s is kept, and else
s is `fill`.

Tensors are [outer, n, inner], and n is reduced: rows have an n of stride 1 and all of them in
`inner`, columns an `inner` of stride 1. A tile is some of `inner` by n, which stays in registers.
What is too long for that is in softmax_wide.py.
"""

import triton
import triton.language as tl


@triton.jit
def place(inner, ROWS: tl.constexpr):
    """The outer index of a program, and its rows: their numbers, and whether they are there."""
    blocks = tl.cdiv(inner, ROWS)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return outer, rows[:, None], (rows < inner)[:, None]


@triton.jit
def columns(first, n, BLOCK: tl.constexpr):
    """The columns of a tile from `first` on, and whether they are there."""
    cols = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
    return cols[None, :], (cols < n)[None, :]


@triton.jit
def mask_rows(outer, rows, m_outer, m_a, m_b, m_c, size_b, size_c):
    """Where the mask's rows are: `inner` is [a, b, c] there."""
    a, b, c = rows // (size_b * size_c), rows // size_c % size_b, rows % size_c
    return outer * m_outer + a * m_a + b * m_b + c * m_c


@triton.jit
def load_logits(x_ptr, x_offsets, mask_ptr, mask_offsets, in_rows, in_cols, scale, fill):
    """s in fp32. Columns past the end are -inf, and count nothing."""
    inside = in_rows & in_cols
    s = tl.load(x_ptr + x_offsets, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        s *= scale
    if mask_ptr is not None:
        if mask_ptr.dtype.element_ty == tl.int1:
            s = tl.where(tl.load(mask_ptr + mask_offsets, mask=inside, other=1), s, fill)
        else:
            s += tl.load(mask_ptr + mask_offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.where(in_cols, s, float("-inf"))


@triton.jit
def normalized(s, largest, total, LOG: tl.constexpr):
    """The result, of the sum of exp(s - largest), which is NaN where s has one."""
    if LOG:
        return s - largest - tl.log(total)
    else:
        return tl.exp(s - largest) * (1.0 / total)


@triton.jit
def load_gradient(dy_ptr, dy_offsets, y_ptr, y_offsets, inside, LOG: tl.constexpr):
    """dy, what it is weighed by, and the terms of the sum over a row: 0 past the end."""
    dy = tl.load(dy_ptr + dy_offsets, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + y_offsets, mask=inside, other=0.0).to(tl.float32)
    if LOG:
        return dy, tl.exp(y), dy
    else:
        return dy, y, dy * y


@triton.jit
def input_gradient(dy, p, total, keep_ptr, mask_offsets, inside, scale, LOG: tl.constexpr):
    """dx of softmax p. What a boolean mask hides has none, be it NaN elsewhere."""
    ds = dy - p * total if LOG else p * (dy - total)
    if scale is not None:
        ds *= scale
    if keep_ptr is not None:
        ds = tl.where(tl.load(keep_ptr + mask_offsets, mask=inside, other=0), ds, 0.0)
    return ds


@triton.jit
def softmax_fwd(
    x_ptr, mask_ptr, y_ptr,
    x_outer, x_n, x_inner, y_n, y_inner, m_outer, m_n, m_a, m_b, m_c, size_b, size_c,
    n, inner, scale, fill,
    LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile of whole rows."""
    outer, rows, in_rows = place(inner, ROWS)
    cols, in_cols = columns(0, n, BLOCK)
    x_offsets = outer * x_outer + rows * x_inner + cols * x_n
    mask_offsets = mask_rows(outer, rows, m_outer, m_a, m_b, m_c, size_b, size_c) + cols * m_n
    s = load_logits(x_ptr, x_offsets, mask_ptr, mask_offsets, in_rows, in_cols, scale, fill)
    largest = tl.max(s, axis=1)[:, None]
    total = tl.sum(tl.exp(s - largest), axis=1)[:, None]
    y_offsets = outer * n * inner + rows * y_inner + cols * y_n
    tl.store(y_ptr + y_offsets, normalized(s, largest, total, LOG), mask=in_rows & in_cols)


@triton.jit
def softmax_bwd(
    dy_ptr, y_ptr, keep_ptr, dx_ptr,
    dy_outer, dy_n, dy_inner, y_n, y_inner, m_outer, m_n, m_a, m_b, m_c, size_b, size_c,
    n, inner, scale,
    LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile of whole rows. keep is the mask if it is boolean."""
    outer, rows, in_rows = place(inner, ROWS)
    cols, in_cols = columns(0, n, BLOCK)
    inside = in_rows & in_cols
    dy_offsets = outer * dy_outer + rows * dy_inner + cols * dy_n
    y_offsets = outer * n * inner + rows * y_inner + cols * y_n
    mask_offsets = mask_rows(outer, rows, m_outer, m_a, m_b, m_c, size_b, size_c) + cols * m_n
    dy, p, terms = load_gradient(dy_ptr, dy_offsets, y_ptr, y_offsets, inside, LOG)
    total = tl.sum(terms, axis=1)[:, None]
    dx = input_gradient(dy, p, total, keep_ptr, mask_offsets, inside, scale, LOG)
    tl.store(dx_ptr + y_offsets, dx, mask=inside)

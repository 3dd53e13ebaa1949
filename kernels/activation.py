"""Elementwise activations with dropout: y = dropout(act(x))."""

import triton
import triton.language as tl

from ._math import activate, derivative
from ._rng import dropout


@triton.jit
def activation_fwd(
    x_ptr, seed_ptr, y_ptr,
    n, a, b, p,
    ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of the flat tensor."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n

    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = activate(x, ACT, a, b)
    if seed_ptr is not None:
        row = tl.zeros((1, 1), dtype=tl.int64)
        y = dropout(y.reshape(1, BLOCK), seed_ptr, row, first, p, BLOCK).reshape(BLOCK)
    tl.store(y_ptr + cols, y, mask=mask)


@triton.jit
def activation_bwd(
    dy_ptr, x_ptr, seed_ptr, dx_ptr,
    n, a, b, p,
    ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of the flat tensor."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n

    dy = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        row = tl.zeros((1, 1), dtype=tl.int64)
        dy = dropout(dy.reshape(1, BLOCK), seed_ptr, row, first, p, BLOCK).reshape(BLOCK)
    if ACT != "none":
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dy *= derivative(x, ACT, a, b)
    tl.store(dx_ptr + cols, dy, mask=mask)

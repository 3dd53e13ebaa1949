"""Gated units: y = value act(gate)."""

import triton
import triton.language as tl

from ._math import activate, derivative
from ._rows import load_tile


@triton.jit
def tile_of(n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program's tile; programs side by side share rows."""
    blocks = tl.cdiv(n_cols, BLOCK)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    left = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    rows = (first + tl.arange(0, ROWS))[:, None]
    cols = (left + tl.arange(0, BLOCK))[None, :]
    return rows, cols, (rows < n_rows) & (cols < n_cols)


@triton.jit
def glu_fwd(
    value_ptr, gate_ptr, y_ptr,
    n_rows, n_cols, value_row, gate_row, y_row, a, b,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile. Each tensor has a stride of its rows."""
    rows, cols, mask = tile_of(n_rows, n_cols, ROWS, BLOCK)
    value = load_tile(value_ptr, rows * value_row + cols, mask)
    gate = load_tile(gate_ptr, rows * gate_row + cols, mask)
    tl.store(y_ptr + rows * y_row + cols, value * activate(gate, ACT, a, b), mask=mask)


@triton.jit
def glu_bwd(
    dy_ptr, value_ptr, gate_ptr, dvalue_ptr, dgate_ptr,
    n_rows, n_cols, dy_row, value_row, gate_row, dvalue_row, dgate_row, a, b,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile: dvalue = dy act(gate), dgate = dy value act'(gate)."""
    rows, cols, mask = tile_of(n_rows, n_cols, ROWS, BLOCK)
    dy = load_tile(dy_ptr, rows * dy_row + cols, mask)
    gate = load_tile(gate_ptr, rows * gate_row + cols, mask)
    if dvalue_ptr is not None:
        dvalue = dy * activate(gate, ACT, a, b)
        tl.store(dvalue_ptr + rows * dvalue_row + cols, dvalue, mask=mask)
    if dgate_ptr is not None:
        value = load_tile(value_ptr, rows * value_row + cols, mask)
        dgate = dy * value
        if ACT != "none":
            dgate *= derivative(gate, ACT, a, b)
        tl.store(dgate_ptr + rows * dgate_row + cols, dgate, mask=mask)

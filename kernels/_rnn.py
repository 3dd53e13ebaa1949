"""Cells of recurrent layers, on tiles of rows and units.

MODE is "lstm" (gates i, f, g, o), "gru" (r, z, n) or the activation of a plain layer. Of an LSTM
its gates are kept for backward, of a GRU its gates and the old h's share of n.
"""

import triton
import triton.language as tl

from ._math import tanh


@triton.jit
def load(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_gates(ptr, rows, cols, mask, H, GATES: tl.constexpr):
    """Up to four tiles of a row's gates; the ones that a cell does not have are the first."""
    offsets = rows[:, None] * (GATES * H) + cols[None, :]
    a = load(ptr, offsets, mask)
    b, c, d = a, a, a
    if GATES >= 3:
        b = load(ptr, offsets + H, mask)
        c = load(ptr, offsets + 2 * H, mask)
    if GATES == 4:
        d = load(ptr, offsets + 3 * H, mask)
    return a, b, c, d


@triton.jit
def store_gates(ptr, rows, cols, mask, H, a, b, c, d, GATES: tl.constexpr):
    offsets = rows[:, None] * (GATES * H) + cols[None, :]
    tl.store(ptr + offsets, a, mask=mask)
    if GATES >= 3:
        tl.store(ptr + offsets + H, b, mask=mask)
        tl.store(ptr + offsets + 2 * H, c, mask=mask)
    if GATES == 4:
        tl.store(ptr + offsets + 3 * H, d, mask=mask)


@triton.jit
def load_weights(w_ptr, offsets, mask, gate, GATES: tl.constexpr):
    """Up to four tiles of weights, `gate` apart, in their own dtype; as of load_gates."""
    w0 = tl.load(w_ptr + offsets, mask=mask, other=0.0)
    w1, w2, w3 = w0, w0, w0
    if GATES >= 3:
        w1 = tl.load(w_ptr + offsets + gate, mask=mask, other=0.0)
        w2 = tl.load(w_ptr + offsets + 2 * gate, mask=mask, other=0.0)
    if GATES == 4:
        w3 = tl.load(w_ptr + offsets + 3 * gate, mask=mask, other=0.0)
    return w0, w1, w2, w3


@triton.jit
def add_products(acc, d0, d1, d2, d3, w0, w1, w2, w3, GATES: tl.constexpr, PRECISION: tl.constexpr):
    """acc and the products of all gates."""
    acc = tl.dot(d0.to(w0.dtype), w0, acc, input_precision=PRECISION)
    if GATES >= 3:
        acc = tl.dot(d1.to(w0.dtype), w1, acc, input_precision=PRECISION)
        acc = tl.dot(d2.to(w0.dtype), w2, acc, input_precision=PRECISION)
    if GATES == 4:
        acc = tl.dot(d3.to(w0.dtype), w3, acc, input_precision=PRECISION)
    return acc


@triton.jit
def cell(
    x0, x1, x2, x3, p0, p1, p2, p3, h, c, y_ptr, c_ptr, gates_ptr, rows, cols, mask, H,
    MODE: tl.constexpr,
):  # fmt: skip
    """The new h and c of the input's share x and the old h's share p of each gate, stored too."""
    if MODE == "lstm":
        i, f, g, o = tl.sigmoid(x0 + p0), tl.sigmoid(x1 + p1), tanh(x2 + p2), tl.sigmoid(x3 + p3)
        c = f * c + i * g
        h = o * tanh(c)
        if gates_ptr is not None:
            store_gates(gates_ptr, rows, cols, mask, H, i, f, g, o, 4)
    elif MODE == "gru":
        r, z = tl.sigmoid(x0 + p0), tl.sigmoid(x1 + p1)
        n = tanh(x2 + r * p2)
        h = n + z * (h - n)
        if gates_ptr is not None:
            store_gates(gates_ptr, rows, cols, mask, H, r, z, n, p2, 4)
    elif MODE == "tanh":
        h = tanh(x0 + p0)
    else:
        h = tl.where(x0 + p0 < 0, 0.0, x0 + p0)
    out = rows[:, None] * H + cols[None, :]
    tl.store(y_ptr + out, h, mask=mask)
    if c_ptr is not None:
        tl.store(c_ptr + out, c, mask=mask)
    return h, c


@triton.jit
def cell_bwd(
    dh, dc, h, c, c_new, y_ptr, gates_ptr, d_ptr, dn_ptr, rows, cols, mask, H,
    MODE: tl.constexpr,
):  # fmt: skip
    """Gradients of a cell with the old h and c: of each gate's share of h, of the old h beside
    these products, and of the old c. Stores d, of the input's shares, and dn, of n's share of h.
    """
    out = rows[:, None] * H + cols[None, :]
    d0, d1, d2, d3 = dh, dh, dh, dh
    if MODE == "lstm":
        i, f, g, o = load_gates(gates_ptr, rows, cols, mask, H, 4)
        t = tanh(c_new)
        dc += dh * o * (1.0 - t * t)
        d0 = dc * g * i * (1.0 - i)
        d1 = dc * c * f * (1.0 - f)
        d2 = dc * i * (1.0 - g * g)
        d3 = dh * t * o * (1.0 - o)
        store_gates(d_ptr, rows, cols, mask, H, d0, d1, d2, d3, 4)
        dh, dc = dh * 0.0, dc * f
    elif MODE == "gru":
        r, z, n, p2 = load_gates(gates_ptr, rows, cols, mask, H, 4)
        dn = dh * (1.0 - z) * (1.0 - n * n)
        d0 = dn * p2 * r * (1.0 - r)
        d1 = dh * (h - n) * z * (1.0 - z)
        d2 = dn * r
        store_gates(d_ptr, rows, cols, mask, H, d0, d1, dn, dn, 3)
        tl.store(dn_ptr + out, d2, mask=mask)
        dh = dh * z
    else:
        y = load(y_ptr, out, mask)
        d0 = dh * (1.0 - y * y) if MODE == "tanh" else tl.where(y <= 0, 0.0, dh)
        tl.store(d_ptr + out, d0, mask=mask)
        dh = dh * 0.0
    return d0, d1, d2, d3, dh, dc

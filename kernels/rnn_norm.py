"""An LSTM with layer norms: of the old h's share of all gates together, and of the new c.

A program takes all units of a tile of rows: for all steps where the weight fits on the chip, else
for one, of which the product with the weight, p, is given.
"""

import triton
import triton.language as tl

from ._math import tanh
from ._rnn import add_products, load, load_gates, load_weights, store_gates


@triton.jit
def load_factors(ptr, cols, H):
    """A vector of factors of each gate, as rows."""
    in_h = cols < H
    a = load(ptr, cols, in_h)[None, :]
    b = load(ptr, cols + H, in_h)[None, :]
    c = load(ptr, cols + 2 * H, in_h)[None, :]
    return a, b, c, load(ptr, cols + 3 * H, in_h)[None, :]


@triton.jit
def sum4(a, b, c, d):
    """The sum of each row of four tiles."""
    return tl.sum(a + b + c + d, axis=1)[:, None]


@triton.jit
def centered(a, b, c, d, mask, H):
    """Four tiles without the mean of their rows; in lanes past the end 0, before and after."""
    mean = sum4(a, b, c, d) / (4 * H)
    a, b = tl.where(mask, a - mean, 0.0), tl.where(mask, b - mean, 0.0)
    return a, b, tl.where(mask, c - mean, 0.0), tl.where(mask, d - mean, 0.0)


@triton.jit
def products(a, w0, w1, w2, w3, acc, PRECISION: tl.constexpr):
    p0 = tl.dot(a, w0, acc, input_precision=PRECISION)
    p1 = tl.dot(a, w1, acc, input_precision=PRECISION)
    p2 = tl.dot(a, w2, acc, input_precision=PRECISION)
    return p0, p1, p2, tl.dot(a, w3, acc, input_precision=PRECISION)


@triton.jit
def through_norm(dy, x_hat, rstd, H):
    """The gradient of what is normalized; in lanes past the end dy and x_hat are 0."""
    along = tl.sum(dy * x_hat, axis=1)[:, None] / H
    return rstd * (dy - tl.sum(dy, axis=1)[:, None] / H - x_hat * along)


@triton.jit
def through_norm4(d0, d1, d2, d3, hat_ptr, rstd, rows, cols, mask, H):
    """Likewise of four tiles that are normalized together, with anything in lanes past the end."""
    p0, p1, p2, p3 = load_gates(hat_ptr, rows, cols, mask, H, 4)
    d0, d1 = tl.where(mask, d0, 0.0), tl.where(mask, d1, 0.0)
    d2, d3 = tl.where(mask, d2, 0.0), tl.where(mask, d3, 0.0)
    mean = sum4(d0, d1, d2, d3) / (4 * H)
    along = sum4(d0 * p0, d1 * p1, d2 * p2, d3 * p3) / (4 * H)
    d0, d1 = rstd * (d0 - mean - p0 * along), rstd * (d1 - mean - p1 * along)
    return d0, d1, rstd * (d2 - mean - p2 * along), rstd * (d3 - mean - p3 * along)


@triton.jit
def add_rows(ptr, offsets, mask, tile):
    """Add the sum of a tile's rows to what lies there."""
    tl.store(ptr + offsets, tl.sum(tile, axis=0) + load(ptr, offsets, mask), mask=mask)


@triton.jit
def norm_cell_bwd(
    dh, dc, c_hat, c_old, i, f, g, o, c_rstd, c_weight, c_bias, mask, H,
):  # fmt: skip
    """Gradients of the gates, of the new c with that through h, and of the old c."""
    tanh_c = tanh(c_hat * c_weight + c_bias)
    d3 = dh * tanh_c * o * (1.0 - o)
    dc = tl.where(mask, dc + dh * o * (1.0 - tanh_c * tanh_c), 0.0)
    du = through_norm(dc * c_weight, c_hat, c_rstd, H)
    d0 = du * g * i * (1.0 - i)
    d1 = du * c_old * f * (1.0 - f)
    return d0, d1, du * i * (1.0 - g * g), d3, dc, du * f


@triton.jit(do_not_specialize=["begin", "end"])
def norm_lstm_fwd(
    xp_ptr, h0_ptr, c0_ptr, w_ptr, p_ptr, weight_ptr, bias_ptr, c_weight_ptr, c_bias_ptr,
    y_ptr, c_hat_ptr, p_hat_ptr, gates_ptr, rstd_ptr, hn_ptr, cn_ptr,
    begin, end, T, B, H, eps,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Steps from `begin` to `end`, as they are walked. Keeps what is normalized, and rstd."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.arange(0, BLOCK_H)
    in_h = (cols < H)[None, :]
    state = rows[:, None] * H + cols[None, :]
    mask = (rows < B)[:, None] & in_h
    h, c = load(h0_ptr, state, mask), load(c0_ptr, state, mask)
    g0, g1, g2, g3 = load_factors(weight_ptr, cols, H)
    b0, b1, b2, b3 = load_factors(bias_ptr, cols, H)
    c_weight = load(c_weight_ptr, cols, cols < H)[None, :]
    c_bias = load(c_bias_ptr, cols, cols < H)[None, :]
    zeros = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
    if w_ptr is not None:
        in_w = (cols < H)[:, None] & in_h
        w0, w1, w2, w3 = load_weights(w_ptr, cols[None, :] * H + cols[:, None], in_w, H * H, 4)

    for step in range(begin, end):
        t = T - 1 - step if REVERSE else step
        at = tl.cast(t, tl.int64) * B + rows
        x0, x1, x2, x3 = load_gates(xp_ptr, at, cols, mask, H, 4)
        if w_ptr is not None:
            a = h.to(xp_ptr.dtype.element_ty)
            p0, p1, p2, p3 = products(a, w0, w1, w2, w3, zeros, PRECISION)
        else:
            p0, p1, p2, p3 = load_gates(p_ptr, rows, cols, mask, H, 4)
        p0, p1, p2, p3 = centered(p0, p1, p2, p3, mask, H)
        rstd = tl.rsqrt(sum4(p0 * p0, p1 * p1, p2 * p2, p3 * p3) / (4 * H) + eps)
        p0, p1, p2, p3 = p0 * rstd, p1 * rstd, p2 * rstd, p3 * rstd
        i, f = tl.sigmoid(x0 + p0 * g0 + b0), tl.sigmoid(x1 + p1 * g1 + b1)
        g, o = tanh(x2 + p2 * g2 + b2), tl.sigmoid(x3 + p3 * g3 + b3)
        u = tl.where(mask, f * c + i * g, 0.0)
        u = tl.where(mask, u - tl.sum(u, axis=1)[:, None] / H, 0.0)
        c_rstd = tl.rsqrt(tl.sum(u * u, axis=1)[:, None] / H + eps)
        u *= c_rstd
        c = u * c_weight + c_bias
        h = o * tanh(c)

        out = at[:, None] * H + cols[None, :]
        tl.store(y_ptr + out, h, mask=mask)
        if gates_ptr is not None:
            store_gates(gates_ptr, at, cols, mask, H, i, f, g, o, 4)
            store_gates(p_hat_ptr, at, cols, mask, H, p0, p1, p2, p3, 4)
            tl.store(c_hat_ptr + out, u, mask=mask)
            tl.store(rstd_ptr + 2 * at[:, None], rstd, mask=(rows < B)[:, None])
            tl.store(rstd_ptr + 2 * at[:, None] + 1, c_rstd, mask=(rows < B)[:, None])
        h = h.to(xp_ptr.dtype.element_ty).to(tl.float32)
    tl.store(hn_ptr + state, h, mask=mask)
    tl.store(cn_ptr + state, c, mask=mask)


@triton.jit(do_not_specialize=["begin", "end"])
def norm_lstm_bwd(
    dy_ptr, dhn_ptr, dcn_ptr, c0_ptr, w_ptr, weight_ptr, c_weight_ptr, c_bias_ptr,
    c_hat_ptr, p_hat_ptr, gates_ptr, rstd_ptr, d_ptr, dp_ptr, dh_ptr, dc_ptr, sums_ptr,
    begin, end, T, B, H,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Steps from `begin` to `end`, counted from the last that was walked. Stores d, gradients of
    xp, and dp, of the product with the weight; adds those of c's factors to the program's sums.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.arange(0, BLOCK_H)
    in_h = (cols < H)[None, :]
    state = rows[:, None] * H + cols[None, :]
    mask = (rows < B)[:, None] & in_h
    dh, dc = load(dhn_ptr, state, mask), load(dcn_ptr, state, mask)
    g0, g1, g2, g3 = load_factors(weight_ptr, cols, H)
    c_weight = load(c_weight_ptr, cols, cols < H)[None, :]
    c_bias = load(c_bias_ptr, cols, cols < H)[None, :]
    dweight = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
    dbias = dweight
    if w_ptr is not None:
        in_w = (cols < H)[:, None] & in_h
        w0, w1, w2, w3 = load_weights(w_ptr, cols[:, None] * H + cols[None, :], in_w, H * H, 4)

    for step in range(begin, end):
        t = step if REVERSE else T - 1 - step
        at = tl.cast(t, tl.int64) * B + rows
        out = at[:, None] * H + cols[None, :]
        i, f, g, o = load_gates(gates_ptr, at, cols, mask, H, 4)
        c_hat = load(c_hat_ptr, out, mask)
        if step < T - 1:
            before = out + B * H if REVERSE else out - B * H
            c_old = load(c_hat_ptr, before, mask) * c_weight + c_bias
        else:
            c_old = load(c0_ptr, state, mask)
        dh += load(dy_ptr, out, mask)
        c_rstd = tl.load(rstd_ptr + 2 * at[:, None] + 1, mask=(rows < B)[:, None], other=0.0)
        d0, d1, d2, d3, dc_new, dc = norm_cell_bwd(
            dh, dc, c_hat, c_old, i, f, g, o, c_rstd, c_weight, c_bias, mask, H
        )  # fmt: skip
        dbias += dc_new
        dweight += dc_new * c_hat
        store_gates(d_ptr, at, cols, mask, H, d0, d1, d2, d3, 4)

        rstd = tl.load(rstd_ptr + 2 * at[:, None], mask=(rows < B)[:, None], other=0.0)
        d0, d1, d2, d3 = through_norm4(
            d0 * g0, d1 * g1, d2 * g2, d3 * g3, p_hat_ptr, rstd, at, cols, mask, H
        )  # fmt: skip
        store_gates(dp_ptr, at, cols, mask, H, d0, d1, d2, d3, 4)
        if w_ptr is not None:
            # lanes past the end meet weights of 0
            dh = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
            dh = add_products(dh, d0, d1, d2, d3, w0, w1, w2, w3, 4, PRECISION)

    tl.store(dh_ptr + state, dh, mask=mask)
    tl.store(dc_ptr + state, dc, mask=mask)
    sums = tl.program_id(0).to(tl.int64) * 2 * H + cols
    add_rows(sums_ptr, sums, cols < H, dweight)
    add_rows(sums_ptr, sums + H, cols < H, dbias)

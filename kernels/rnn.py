"""Recurrent layers, of which the input's product xp is given.

Rows of all steps lie behind one another: step t has n rows from `start` on, the longest sequences
first. Two ways: a launch for each step, whose programs take tiles of rows and units; or one launch,
whose programs walk all steps of a tile of rows with the weight on the chip.
"""

import triton
import triton.language as tl

from ._rnn import add_products, cell, cell_bwd, load, load_gates, load_weights


@triton.jit
def load_state(ptr, first, initial_ptr, rows, began, cols, width, mask):
    """Rows of a state from `first` on. With an initial state, rows that have not begun are its."""
    ptrs = ptr + (first + rows)[:, None] * width + cols[None, :]
    if initial_ptr is None:
        state = tl.load(ptrs, mask=mask, other=0.0)
    else:
        state = tl.load(ptrs, mask=mask & began[:, None], other=0.0)
        initial_ptrs = initial_ptr + rows[:, None] * width + cols[None, :]
        fresh = mask & (began == 0)[:, None]
        state = tl.where(began[:, None], state, tl.load(initial_ptrs, mask=fresh, other=0.0))
    return state


@triton.jit(do_not_specialize=["start", "n", "prev", "n_prev"])
def rnn_step_fwd(
    xp_ptr, h_old_ptr, h0_ptr, c_old_ptr, c0_ptr, w_ptr, b_ptr, y_ptr, c_ptr, gates_ptr,
    start, n, prev, n_prev, H,
    MODE: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step. The old state is that of n_prev rows from `prev` on; rows beyond begin here, with
    the initial state. Where it is of one kind for all rows, the other is not given.
    """
    GATES: tl.constexpr = 4 if MODE == "lstm" else 3 if MODE == "gru" else 1
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    active, began = rows < n, rows < n_prev
    mask = active[:, None] & (cols < H)[None, :]
    at, first = tl.cast(start, tl.int64) + rows, tl.cast(prev, tl.int64)
    x0, x1, x2, x3 = load_gates(xp_ptr, at, cols, mask, H, GATES)

    ks = tl.arange(0, BLOCK_K)
    gate = tl.cast(H, tl.int64) * H  # from the weight of one gate to that of the next
    w_ptrs = w_ptr + cols[None, :] * H + ks[:, None]
    p0 = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
    p1, p2, p3 = p0, p0, p0
    for k in range(0, H, BLOCK_K):
        in_k = ks < (BLOCK_K if EVEN_K else H - k)
        a = load_state(
            h_old_ptr, first, h0_ptr, rows, began, ks + k, H, active[:, None] & in_k[None, :]
        )
        in_w = in_k[:, None] & (cols < H)[None, :]
        p0 = tl.dot(a, tl.load(w_ptrs, mask=in_w, other=0.0), p0, input_precision=PRECISION)
        if GATES >= 3:
            w = tl.load(w_ptrs + gate, mask=in_w, other=0.0)
            p1 = tl.dot(a, w, p1, input_precision=PRECISION)
            w = tl.load(w_ptrs + 2 * gate, mask=in_w, other=0.0)
            p2 = tl.dot(a, w, p2, input_precision=PRECISION)
        if GATES == 4:
            w = tl.load(w_ptrs + 3 * gate, mask=in_w, other=0.0)
            p3 = tl.dot(a, w, p3, input_precision=PRECISION)
        w_ptrs += BLOCK_K

    h, c = p0, p0
    if MODE == "lstm":
        c = load_state(c_old_ptr, first, c0_ptr, rows, began, cols, H, mask).to(tl.float32)
    elif MODE == "gru":
        h = load_state(h_old_ptr, first, h0_ptr, rows, began, cols, H, mask).to(tl.float32)
        if b_ptr is not None:
            p0 += load(b_ptr, cols, cols < H)[None, :]
            p1 += load(b_ptr, H + cols, cols < H)[None, :]
            p2 += load(b_ptr, 2 * H + cols, cols < H)[None, :]
    cell(
        x0, x1, x2, x3, p0, p1, p2, p3, h, c, y_ptr, c_ptr, gates_ptr, at, cols, mask, H,
        MODE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "n", "prev", "n_prev", "after", "n_after"])
def rnn_step_bwd(
    dy_ptr, dhn_ptr, dcn_ptr, h_old_ptr, h0_ptr, c_old_ptr, c0_ptr, w_ptr, y_ptr, c_ptr, gates_ptr,
    d_ptr, dn_ptr, dh_ptr, dc_ptr,
    start, n, prev, n_prev, after, n_after, H,
    MODE: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step back, with the old state as in the step. Forward went on with the n_after rows
    from `after` on; rows beyond ended here.

    dc holds the gradient of c, dh that of h as far as it is no product, from step to step.
    """
    GATES: tl.constexpr = 4 if MODE == "lstm" else 3 if MODE == "gru" else 1
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    active, began, goes_on = rows < n, rows < n_prev, rows < n_after
    mask = active[:, None] & (cols < H)[None, :]
    going = goes_on[:, None] & mask
    ending = mask & (rows >= n_after)[:, None]

    ks = tl.arange(0, BLOCK_K)
    d_rows = (tl.cast(after, tl.int64) + rows)[:, None]
    gate = tl.cast(H, tl.int64) * H
    acc = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
    for k in range(0, tl.where(n_after > 0, H, 0), BLOCK_K):
        in_k = ks < (BLOCK_K if EVEN_K else H - k)
        in_d = goes_on[:, None] & in_k[None, :]
        in_w = in_k[:, None] & (cols < H)[None, :]
        w_ptrs = w_ptr + (tl.cast(k, tl.int64) + ks)[:, None] * H + cols[None, :]
        for g in tl.static_range(GATES):
            if MODE == "gru" and g == 2:
                d = tl.load(dn_ptr + d_rows * H + (ks + k)[None, :], mask=in_d, other=0.0)
            else:
                d_ptrs = d_ptr + d_rows * (GATES * H) + (ks + g * H + k)[None, :]
                d = tl.load(d_ptrs, mask=in_d, other=0.0)
            w = tl.load(w_ptrs + g * gate, mask=in_w, other=0.0)
            acc = tl.dot(d, w, acc, input_precision=PRECISION)

    at, first = tl.cast(start, tl.int64) + rows, tl.cast(prev, tl.int64)
    state = rows[:, None] * H + cols[None, :]
    dh = load(dy_ptr, at[:, None] * H + cols[None, :], mask) + acc
    dh += load(dhn_ptr, state, ending)
    dc, h, c, c_new = acc, acc, acc, acc
    if MODE == "lstm":
        c_new = load(c_ptr, at[:, None] * H + cols[None, :], mask)
        dc = load(dc_ptr, state, going) + load(dcn_ptr, state, ending)
        c = load_state(c_old_ptr, first, c0_ptr, rows, began, cols, H, mask).to(tl.float32)
    elif MODE == "gru":
        dh += load(dh_ptr, state, going)
        h = load_state(h_old_ptr, first, h0_ptr, rows, began, cols, H, mask).to(tl.float32)
    _, _, _, _, dh, dc = cell_bwd(
        dh, dc, h, c, c_new, y_ptr, gates_ptr, d_ptr, dn_ptr, at, cols, mask, H,
        MODE,
    )  # fmt: skip
    if MODE == "lstm":
        tl.store(dc_ptr + state, dc, mask=mask)
    elif MODE == "gru":
        tl.store(dh_ptr + state, dh, mask=mask)


@triton.jit
def bounds(starts_ptr, t, B):
    """Where the rows of step t start, and how many there are."""
    first, n = tl.cast(t, tl.int64) * B, tl.cast(B, tl.int64)
    if starts_ptr is not None:
        first = tl.load(starts_ptr + t)
        n = tl.load(starts_ptr + t + 1) - first
    return first, n


@triton.jit
def rnn_walk_fwd(
    xp_ptr, h0_ptr, c0_ptr, w_ptr, b_ptr, starts_ptr, y_ptr, c_ptr, gates_ptr, hn_ptr, cn_ptr,
    T, B, H,
    MODE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All steps of a tile of rows. h and c stay in registers, h rounded as it is stored."""
    GATES: tl.constexpr = 4 if MODE == "lstm" else 3 if MODE == "gru" else 1
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.arange(0, BLOCK_H)
    in_h = (cols < H)[None, :]
    state = rows[:, None] * H + cols[None, :]
    mask = (rows < B)[:, None] & in_h
    h = load(h0_ptr, state, mask)
    c = h
    if MODE == "lstm":
        c = load(c0_ptr, state, mask)

    in_w = (cols < H)[:, None] & in_h
    w0, w1, w2, w3 = load_weights(
        w_ptr, cols[None, :] * H + cols[:, None], in_w, H * H, GATES
    )  # fmt: skip
    zeros = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
    b0, b1, b2 = zeros, zeros, zeros
    if b_ptr is not None:
        b0 += load(b_ptr, cols, cols < H)[None, :]
        b1 += load(b_ptr, H + cols, cols < H)[None, :]
        b2 += load(b_ptr, 2 * H + cols, cols < H)[None, :]

    for step in range(T):
        first, n = bounds(starts_ptr, T - 1 - step if REVERSE else step, B)
        active = (rows < n)[:, None] & in_h
        x0, x1, x2, x3 = load_gates(xp_ptr, first + rows, cols, active, H, GATES)
        a = h.to(w0.dtype)
        p0 = tl.dot(a, w0, b0, input_precision=PRECISION)
        p1, p2, p3 = p0, p0, p0
        if GATES >= 3:
            p1 = tl.dot(a, w1, b1, input_precision=PRECISION)
            p2 = tl.dot(a, w2, b2, input_precision=PRECISION)
        if GATES == 4:
            p3 = tl.dot(a, w3, zeros, input_precision=PRECISION)
        h_new, c_new = cell(
            x0, x1, x2, x3, p0, p1, p2, p3, h, c, y_ptr, c_ptr, gates_ptr,
            first + rows, cols, active, H,
            MODE,
        )  # fmt: skip
        h = tl.where(active, h_new.to(w0.dtype).to(tl.float32), h)
        c = tl.where(active, c_new, c)

    tl.store(hn_ptr + state, h, mask=mask)
    if MODE == "lstm":
        tl.store(cn_ptr + state, c, mask=mask)


@triton.jit
def rnn_walk_bwd(
    dy_ptr, dhn_ptr, dcn_ptr, h0_ptr, c0_ptr, w_ptr, starts_ptr, y_ptr, c_ptr, gates_ptr,
    d_ptr, dn_ptr, dh_ptr, dc_ptr,
    T, B, H,
    MODE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All steps back of a tile of rows; at the end dh and dc are those of the initial states."""
    GATES: tl.constexpr = 4 if MODE == "lstm" else 3 if MODE == "gru" else 1
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.arange(0, BLOCK_H)
    in_h = (cols < H)[None, :]
    state = rows[:, None] * H + cols[None, :]
    mask = (rows < B)[:, None] & in_h
    dh = load(dhn_ptr, state, mask)
    dc = dh
    if MODE == "lstm":
        dc = load(dcn_ptr, state, mask)

    in_w = (cols < H)[:, None] & in_h
    w0, w1, w2, w3 = load_weights(
        w_ptr, cols[:, None] * H + cols[None, :], in_w, H * H, GATES
    )  # fmt: skip

    c, n = dh, tl.cast(B, tl.int64) * 0
    for step in range(T):
        t = step if REVERSE else T - 1 - step
        n_after = n
        first, n = bounds(starts_ptr, t, B)
        active = (rows < n)[:, None] & in_h
        out = (first + rows)[:, None] * H + cols[None, :]
        # forward came from `prev`, or from the initial state
        prev, n_prev = first, n * 0
        if step < T - 1:
            prev, n_prev = bounds(starts_ptr, t + 1 if REVERSE else t - 1, B)
        began = rows < n_prev
        h, c_new = dh, dh
        if MODE == "lstm":
            # the old c of the step after is the new one of this
            goes_on = (rows < n_after)[:, None]
            c_new = tl.where(goes_on, c, load(c_ptr, out, active & (rows >= n_after)[:, None]))
            c = load_state(c_ptr, prev, c0_ptr, rows, began, cols, H, active).to(tl.float32)
        elif MODE == "gru":
            h = load_state(y_ptr, prev, h0_ptr, rows, began, cols, H, active).to(tl.float32)
        dy = load(dy_ptr, out, active)
        d0, d1, d2, d3, dh_new, dc_new = cell_bwd(
            dh + dy, dc, h, c, c_new, y_ptr, gates_ptr, d_ptr, dn_ptr,
            first + rows, cols, active, H,
            MODE,
        )  # fmt: skip
        dh_new = add_products(dh_new, d0, d1, d2, d3, w0, w1, w2, w3, GATES, PRECISION)
        dh = tl.where(active, dh_new, dh)
        dc = tl.where(active, dc_new, dc)

    tl.store(dh_ptr + state, dh, mask=mask)
    if MODE == "lstm":
        tl.store(dc_ptr + state, dc, mask=mask)

"""Attention backward. With p the probabilities, dp = do vᵀ and delta = rowsum(do o) - dlse:
ds = p (dp - delta), dq = scale ds k, dk = scale dsᵀ q, dv = pᵀ do, dbias = ds.

Nothing is added up by several programs, so each gradient has the same bits in every run.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._attention import (
    Form,
    Sees,
    blocks_seen,
    head_of,
    is_boolean,
    kept_by_dropout,
    load_lse,
    load_mask,
    load_rows,
    load_slopes,
    load_tile,
    logit_gradients,
    mask_rows_of,
    place_of,
    probabilities,
    program,
    rows_of,
    seen_keys,
    sequence,
    source_of,
    unit_of,
)


@triton.jit
def attention_delta(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, o_b, o_h, o_s, do_b, do_h, do_s, n_heads, n_q, n_rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta of rows [batch, head, query]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < n_rows
    b, head, query = place // n_q // n_heads, place // n_q % n_heads, place % n_q
    o = load_tile(o_ptr + (b * o_b + head * o_h + query * o_s) * STEP, inside, DV, BLOCK_DV)
    do = load_tile(do_ptr + (b * do_b + head * do_h + query * do_s) * STEP, inside, DV, BLOCK_DV)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + place, mask=inside, other=0.0)
    tl.store(delta_ptr + place, delta, mask=inside)


@triton.jit
def add_dq(
    dq, q, do, lse, share, delta, k, v, rows, begin, end, form, sees, seed_ptr, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """What keys begin..end add to dq / scale."""
    n = tl.arange(0, BLOCK_N)
    HIDES: tl.constexpr = CHECK or is_boolean(form.mask_ptr)
    for start in range(begin, end, BLOCK_N):
        j = start + n
        given = load_mask(form, j[None, :], sees.n_k)
        seen = seen_keys(j, rows.first, rows.last, given, form, sees, 0)
        keys = load_rows(k, start, n, seen, D, q.shape[1], HIDES)
        values = load_rows(v, start, n, seen, DV, do.shape[1], HIDES)
        s = tl.dot(q, keys.T, input_precision=PRECISION)
        p, steep = probabilities(
            s, rows.i[:, None], j[None, :], lse[:, None], share[:, None], given, form, sees, CHECK
        )
        dp = tl.dot(do, values.T, input_precision=PRECISION)
        kept = kept_by_dropout(seed_ptr, rows.place[:, None], start, p_drop, BLOCK_N)
        ds = logit_gradients(p, dp, delta[:, None], kept, form, CHECK) * steep
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_dq(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, used_k_ptr,
    do_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    mask_b, mask_h, mask_q, n_heads, n_group, n_q, n_k, n_blocks,
    scale, softcap, left, right, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    FOLDED: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per block of rows, key-value head and sequence."""
    block, kv, b = program(n_blocks, n_heads // n_group)
    if right is not None:
        block = n_blocks - 1 - block
    q_start, q_len = sequence(cu_q_ptr, None, b, n_q)
    k_start, k_len = sequence(cu_k_ptr, used_k_ptr, b, n_k)
    if block * BLOCK_M >= q_len * n_group:
        return
    shift = 0 if cu_q_ptr is None else k_len - q_len
    rows = rows_of(block, kv, b, q_start, q_len, shift, cu_q_ptr, n_heads, n_group, n_q, BLOCK_M)
    mask_rows = mask_rows_of(b, rows.head[:, None], rows.query[:, None], mask_b, mask_h, mask_q)
    slopes = load_slopes(slopes_ptr, rows.head[:, None])
    own, unit = None if FOLDED else scale, unit_of(scale, FOLDED)
    form = Form(own, unit, softcap, mask_ptr, mask_rows, slopes)
    sees = Sees(k_len, left, right)

    query = rows.query.to(tl.int64)
    q_head = head_of(q_ptr, b, rows.head, q_start, q_b, q_h, q_s, cu_q_ptr, STEP)
    do_head = head_of(do_ptr, b, rows.head, q_start, do_b, do_h, do_s, cu_q_ptr, STEP)
    q = load_tile(q_head + query * (q_s * STEP), rows.inside, D, BLOCK_D)
    do = load_tile(do_head + query * (do_s * STEP), rows.inside, DV, BLOCK_DV)
    lse, share = load_lse(lse_ptr, rows.place, rows.inside)
    delta = tl.load(delta_ptr + rows.place, mask=rows.inside, other=0.0)
    k = source_of(k_ptr, b, kv, k_start, k_b, k_h, k_s, cu_k_ptr, STEP)
    v = source_of(v_ptr, b, kv, k_start, v_b, v_h, v_s, cu_k_ptr, STEP)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, full, rest, end = blocks_seen(rows.first, rows.last, k_len, left, right, BLOCK_N)
    if left is not None:
        dq = add_dq(
            dq, q, do, lse, share, delta, k, v, rows, begin, full,
            form, sees, seed_ptr, p_drop, D, DV, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    dq = add_dq(
        dq, q, do, lse, share, delta, k, v, rows, full, rest,
        form, sees, seed_ptr, p_drop, D, DV, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    dq = add_dq(
        dq, q, do, lse, share, delta, k, v, rows, rest, end,
        form, sees, seed_ptr, p_drop, D, DV, BLOCK_N, PRECISION, True,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    dq_head = head_of(dq_ptr, b, rows.head, q_start, dq_b, dq_h, dq_s, cu_q_ptr, STEP)
    dq_ptrs = (dq_head + query * (dq_s * STEP))[:, None] + d[None, :]
    tl.store(dq_ptrs, dq * scale, mask=rows.inside[:, None] & (d < D)[None, :])


class Queries(NamedTuple):
    """The n queries of a head and what backward needs of them: lse and delta from their place on,
    their masks, and by how much their positions are shifted.
    """

    q: tl.tensor
    do: tl.tensor
    lse_ptr: tl.tensor
    delta_ptr: tl.tensor
    place: tl.tensor
    n: tl.tensor
    shift: tl.tensor
    mask_ptr: tl.tensor
    mask_first: tl.tensor
    mask_q: tl.tensor
    slopes: tl.tensor


@triton.jit
def add_dkdv(
    dk, dv, keys, values, first_key, of, begin, end, scale, softcap, sees, seed_ptr, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, FOLDED: tl.constexpr,
    PRECISION: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """What queries begin..end of a head add to dk / scale and dv. Tiles are keys by queries."""
    m = tl.arange(0, BLOCK_M)
    j = first_key + tl.arange(0, keys.shape[0])
    for start in range(begin, end, BLOCK_M):
        query = start + m
        inside = query < of.n
        q_tile = load_rows(of.q, start, m, inside, D, keys.shape[1], True)
        do_tile = load_rows(of.do, start, m, inside, DV, values.shape[1], True)
        lse, share = load_lse(of.lse_ptr, of.place + query, inside)
        delta = tl.load(of.delta_ptr + of.place + query, mask=inside, other=0.0)
        # rows past the end see what the last query sees, and have a mask
        query = tl.minimum(query, of.n - 1)
        mask_rows = of.mask_first
        if of.mask_q is not None:
            mask_rows += query.to(tl.int64)[None, :] * of.mask_q
        own, unit = None if FOLDED else scale, unit_of(scale, FOLDED)
        form = Form(own, unit, softcap, of.mask_ptr, mask_rows, of.slopes)
        given = load_mask(form, j[:, None], sees.n_k)
        s = tl.dot(keys, q_tile.T, input_precision=PRECISION)
        i = (query + of.shift)[None, :]
        p, steep = probabilities(
            s, i, j[:, None], lse[None, :], share[None, :], given, form, sees, CHECK
        )
        places = (of.place + query)[:, None]
        kept = kept_by_dropout(seed_ptr, places, first_key, p_drop, keys.shape[0])
        if seed_ptr is not None:
            kept = kept.T
        dropped = (p * kept).to(do_tile.dtype)
        dv = tl.dot(dropped, do_tile, dv, input_precision=PRECISION)
        dp = tl.dot(values, do_tile.T, input_precision=PRECISION)
        ds = logit_gradients(p, dp, delta[None, :], kept, form, CHECK) * steep
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_dkdv(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, used_k_ptr,
    do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, mask_b, mask_h, mask_q,
    n_heads, n_group, n_q, n_k, n_blocks, scale, softcap, left, right, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    FOLDED: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per block of keys, key-value head and sequence: all queries that may see them."""
    block, kv, b = program(n_blocks, n_heads // n_group)
    q_start, q_len = sequence(cu_q_ptr, None, b, n_q)
    k_start, k_len = sequence(cu_k_ptr, used_k_ptr, b, n_k)
    if block * BLOCK_N >= k_len:
        return
    shift = 0 if cu_q_ptr is None else k_len - q_len
    sees = Sees(k_len, left, right)
    first_key, n = block * BLOCK_N, tl.arange(0, BLOCK_N)
    inside, last = first_key + n < k_len, tl.minimum(first_key + BLOCK_N, k_len) - 1
    k = source_of(k_ptr, b, kv, k_start, k_b, k_h, k_s, cu_k_ptr, STEP)
    v = source_of(v_ptr, b, kv, k_start, v_b, v_h, v_s, cu_k_ptr, STEP)
    keys = load_rows(k, first_key, n, inside, D, BLOCK_D, True)
    values = load_rows(v, first_key, n, inside, DV, BLOCK_DV, True)

    # a key sees those queries that see it
    begin, full, rest, end = blocks_seen(
        first_key - shift, last - shift, q_len, right, left, BLOCK_M
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for head in range(kv * n_group, (kv + 1) * n_group):
        of = Queries(
            source_of(q_ptr, b, head, q_start, q_b, q_h, q_s, cu_q_ptr, STEP),
            source_of(do_ptr, b, head, q_start, do_b, do_h, do_s, cu_q_ptr, STEP),
            lse_ptr, delta_ptr, place_of(b, head, q_start, cu_q_ptr, n_heads, n_q), q_len, shift,
            mask_ptr, mask_rows_of(b, head, 0, mask_b, mask_h, mask_q), mask_q,
            load_slopes(slopes_ptr, head),
        )  # fmt: skip
        if right is not None:
            dk, dv = add_dkdv(
                dk, dv, keys, values, first_key, of, begin, full, scale, softcap, sees, seed_ptr,
                p_drop, D, DV, BLOCK_M, FOLDED, PRECISION, True,
            )  # fmt: skip
        dk, dv = add_dkdv(
            dk, dv, keys, values, first_key, of, full, end if left is None else rest, scale,
            softcap, sees, seed_ptr, p_drop, D, DV, BLOCK_M, FOLDED, PRECISION, False,
        )  # fmt: skip
        if left is not None:
            dk, dv = add_dkdv(
                dk, dv, keys, values, first_key, of, rest, end, scale, softcap, sees, seed_ptr,
                p_drop, D, DV, BLOCK_M, FOLDED, PRECISION, True,
            )  # fmt: skip
    if dk_ptr is not None:
        to = source_of(dk_ptr, b, kv, k_start, dk_b, dk_h, dk_s, cu_k_ptr, STEP)
        store_rows(to, dk * scale, first_key, k_len, D)
    if dv_ptr is not None:
        to = source_of(dv_ptr, b, kv, k_start, dv_b, dv_h, dv_s, cu_k_ptr, STEP)
        store_rows(to, dv, first_key, k_len, DV)


@triton.jit
def store_rows(to, tile, first, n, DIM: tl.constexpr):
    """Store a tile as a head's rows from `first` on, those below n."""
    rows, d = first + tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    ptrs = to.ptr + (rows.to(tl.int64) * to.stride)[:, None] + d[None, :]
    tl.store(ptrs, tile, mask=(rows < n)[:, None] & (d < DIM)[None, :])


@triton.jit
def attention_dbias(
    q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, seed_ptr, do_ptr, lse_ptr, delta_ptr, dbias_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, bias_b, bias_h, bias_q,
    n_heads, n_group, n_q, n_k, tiles_q, tiles_k, bias_heads, turns_b, turns_h, turns_q, part_size,
    scale, softcap, left, right, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ONE_ROW: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per tile of the bias and part. Parts share the turns: what the bias stands for.

    turns_b, turns_h and turns_q are batches, heads and blocks of queries, 1 where it has its own.
    """
    first_key = tl.program_id(0) % tiles_k * BLOCK_N
    tile = tl.program_id(0) // tiles_k
    own_block, own_head = tile % tiles_q, tile // tiles_q % bias_heads
    own_batch = tile // tiles_q // bias_heads
    part = tl.program_id(1)
    sees = Sees(n_k, left, right)
    m, j = tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for turn in range(part, turns_b * turns_h * turns_q, tl.num_programs(1)):
        first = (own_block + turn % turns_q) * BLOCK_M
        head = own_head + turn // turns_q % turns_h
        b = own_batch + turn // turns_q // turns_h
        begin, _, _, end = blocks_seen(
            first, tl.minimum(first + BLOCK_M, n_q) - 1, n_k, left, right, BLOCK_N
        )
        if (first_key >= begin) & (first_key < end):
            query = tl.minimum(first + m, n_q - 1)
            mask_rows = mask_rows_of(b, head, query[:, None], bias_b, bias_h, bias_q)
            slopes = load_slopes(slopes_ptr, head)
            form = Form(scale, unit_of(scale, False), softcap, bias_ptr, mask_rows, slopes)
            q = source_of(q_ptr, b, head, 0, q_b, q_h, q_s, None, STEP)
            do = source_of(do_ptr, b, head, 0, do_b, do_h, do_s, None, STEP)
            kv = head // n_group
            k = source_of(k_ptr, b, kv, 0, k_b, k_h, k_s, None, STEP)
            v = source_of(v_ptr, b, kv, 0, v_b, v_h, v_s, None, STEP)
            place = place_of(b, head, 0, None, n_heads, n_q) + first
            acc += bias_turn(
                q, k, v, do, lse_ptr, delta_ptr, place, first, first_key, n_q,
                form, sees, seed_ptr, p_drop, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    part_ptr = dbias_ptr + tl.cast(part, tl.int64) * part_size
    if ONE_ROW:
        row = part_ptr + tl.cast(tile, tl.int64) * n_k + j
        tl.store(row, tl.sum(acc, axis=0), mask=j < n_k)
    else:
        rows = (tile // tiles_q).to(tl.int64) * n_q + own_block * BLOCK_M + m
        keep = (own_block * BLOCK_M + m < n_q)[:, None] & (j < n_k)[None, :]
        tl.store(part_ptr + rows[:, None] * n_k + j[None, :], acc, mask=keep)


@triton.jit
def bias_turn(
    q, k, v, do, lse_ptr, delta_ptr, place, first, first_key, n_q,
    form, sees, seed_ptr, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds of one tile."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    j, inside = first_key + n, first + m < n_q
    i = tl.minimum(first + m, n_q - 1)
    q_tile = load_rows(q, first, m, inside, D, BLOCK_D, True)
    do_tile = load_rows(do, first, m, inside, DV, BLOCK_DV, True)
    keys = load_rows(k, first_key, n, j < sees.n_k, D, BLOCK_D, True)
    values = load_rows(v, first_key, n, j < sees.n_k, DV, BLOCK_DV, True)
    lse, share = load_lse(lse_ptr, place + m, inside)
    delta = tl.load(delta_ptr + place + m, mask=inside, other=0.0)
    given = load_mask(form, j[None, :], sees.n_k)
    s = tl.dot(q_tile, keys.T, input_precision=PRECISION)
    p, _ = probabilities(
        s, i[:, None], j[None, :], lse[:, None], share[:, None], given, form, sees, True
    )
    dp = tl.dot(do_tile, values.T, input_precision=PRECISION)
    kept = kept_by_dropout(seed_ptr, (place + m)[:, None], first_key, p_drop, BLOCK_N)
    return logit_gradients(p, dp, delta[:, None], kept, form, True)

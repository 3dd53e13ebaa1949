"""Attention forward: o = softmax(logits) v with an online softmax, in base 2.

All query heads of a key-value head share a tile, so that keys are read once for them.
"""

import triton
import triton.language as tl

from ._attention import (
    LOG2E,
    Form,
    Sees,
    Source,
    blocks_seen,
    head_of,
    is_boolean,
    kept_by_dropout,
    load_mask,
    load_rows,
    load_slopes,
    load_tile,
    logits,
    lse_of,
    mask_rows_of,
    program,
    rows_of,
    seen_keys,
    sequence,
    source_of,
    unit_of,
)


@triton.jit
def attend(
    acc, total, peak, q, k, v, rows, begin, end, form, sees, seed_ptr, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Keys begin..end join the row's sums of exponentials, which are relative to its peak."""
    n = tl.arange(0, BLOCK_N)
    HIDES: tl.constexpr = CHECK or is_boolean(form.mask_ptr)
    for start in range(begin, end, BLOCK_N):
        j = start + n
        given = load_mask(form, j[None, :], sees.n_k)
        seen = seen_keys(j, rows.first, rows.last, given, form, sees, 0)
        keys = load_rows(k, start, n, seen, D, q.shape[1], HIDES)
        s = tl.dot(q, keys.T, input_precision=PRECISION)
        s, _ = logits(s, rows.i[:, None], j[None, :], given, form, sees, CHECK)
        new_peak = tl.maximum(peak, tl.max(s, axis=1) * form.unit)
        # a row may have seen nothing yet
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s * form.unit - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, axis=1)
        p *= kept_by_dropout(seed_ptr, rows.place[:, None], start, p_drop, BLOCK_N)
        values = load_rows(v, start, n, seen, DV, acc.shape[1], HIDES)
        acc *= shrink[:, None]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit
def attention_fwd(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, sinks_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr, used_k_ptr, table_ptr, o_ptr, lse_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, mask_b, mask_h, mask_q,
    table_b, page_rows, o_split, lse_split, n_heads, n_group, n_q, n_k, n_blocks,
    scale, softcap, left, right, p_drop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    FOLDED: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per block of rows, key-value head, sequence, and split of the keys."""
    block, kv, b = program(n_blocks, n_heads // n_group)
    split = tl.program_id(1)
    if right is not None:
        block = n_blocks - 1 - block  # the longest first
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

    q_head = head_of(q_ptr, b, rows.head, q_start, q_b, q_h, q_s, cu_q_ptr, STEP)
    q = load_tile(q_head + rows.query.to(tl.int64) * (q_s * STEP), rows.inside, D, BLOCK_D)
    k, v = sources(
        k_ptr, v_ptr, b, kv, k_start, k_b, k_h, k_s, v_b, v_h, v_s, cu_k_ptr,
        table_ptr, table_b, page_rows, STEP,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total, peak = begin_with(sinks_ptr, rows, split)
    begin, full, rest, end = blocks_seen(rows.first, rows.last, k_len, left, right, BLOCK_N)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    low, high = begin + split * share, begin + (split + 1) * share
    if left is not None:
        acc, total, peak = attend(
            acc, total, peak, q, k, v, rows, low, tl.minimum(full, high),
            form, sees, seed_ptr, p_drop, D, DV, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    acc, total, peak = attend(
        acc, total, peak, q, k, v, rows, tl.maximum(full, low), tl.minimum(rest, high),
        form, sees, seed_ptr, p_drop, D, DV, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    acc, total, peak = attend(
        acc, total, peak, q, k, v, rows, tl.maximum(rest, low), tl.minimum(end, high),
        form, sees, seed_ptr, p_drop, D, DV, BLOCK_N, PRECISION, True,
    )  # fmt: skip

    o_head = head_of(o_ptr + split * o_split, b, rows.head, q_start, o_b, o_h, o_s, cu_q_ptr, STEP)
    dv = tl.arange(0, BLOCK_DV)
    o_ptrs = (o_head + rows.query.to(tl.int64) * (o_s * STEP))[:, None] + dv[None, :]
    o = acc * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    tl.store(o_ptrs, o, mask=rows.inside[:, None] & (dv < DV)[None, :])
    lse_ptrs = lse_ptr + split * lse_split + rows.place
    tl.store(lse_ptrs, lse_of(peak, total), mask=rows.inside)


@triton.jit
def begin_with(sinks_ptr, rows, split):
    """The sum of exponentials and the peak of rows before any key."""
    total = tl.zeros(rows.head.shape, tl.float32)
    peak = tl.full(rows.head.shape, float("-inf"), tl.float32)
    if sinks_ptr is not None:
        # a logit that brings no value, and is there once
        sink = tl.load(sinks_ptr + rows.head).to(tl.float32) * LOG2E
        peak = tl.where(split == 0, sink, peak)
        total = tl.where(split == 0, 1.0, total)
    return total, peak


@triton.jit
def sources(
    k_ptr, v_ptr, b, kv, k_start, k_b, k_h, k_s, v_b, v_h, v_s, cu_k_ptr,
    table_ptr, table_b, page_rows, STEP: tl.constexpr,
):  # fmt: skip
    """Keys and values of a head: rows of a tensor, or of pages b's row of the table names."""
    if table_ptr is None:
        k = source_of(k_ptr, b, kv, k_start, k_b, k_h, k_s, cu_k_ptr, STEP)
        v = source_of(v_ptr, b, kv, k_start, v_b, v_h, v_s, cu_k_ptr, STEP)
    else:
        table, head = table_ptr + tl.cast(b, tl.int64) * table_b, tl.cast(kv, tl.int64)
        k = Source(k_ptr + head * k_h * STEP, k_s * STEP, table, k_b * STEP, page_rows)
        v = Source(v_ptr + head * v_h * STEP, v_s * STEP, table, v_b * STEP, page_rows)
    return k, v


@triton.jit
def attention_merge(
    o_parts_ptr, lse_parts_ptr, o_ptr, lse_ptr, o_b, o_h, o_s, n_heads, n_q, n_rows, n_splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows [batch, head, query] of the splits, weighted by their shares of the exponentials."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < n_rows
    dv = tl.arange(0, BLOCK_DV)
    keep = inside[:, None] & (dv < DV)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in range(n_splits):
        part = tl.cast(split, tl.int64) * n_rows + place
        lse = tl.load(lse_parts_ptr + part, mask=inside, other=float("-inf"))
        new_peak = tl.maximum(peak, lse)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink, weight = tl.exp2(peak - base), tl.exp2(lse - base)
        o = tl.load(o_parts_ptr + part[:, None] * DV + dv[None, :], mask=keep, other=0.0)
        acc = acc * shrink[:, None] + o * weight[:, None]
        total = total * shrink + weight
        peak = new_peak
    o = acc * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    head, query = place // n_q % n_heads, place % n_q
    o_rows = o_ptr + (place // n_q // n_heads * o_b + head * o_h + query * o_s) * STEP
    tl.store(o_rows[:, None] + dv[None, :], o, mask=keep)
    tl.store(lse_ptr + place, peak + tl.log2(total), mask=inside)

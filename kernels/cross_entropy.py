"""Cross entropy of rows of logits x, whose classes lie x_class apart.

Of z = softcap tanh(x / softcap) and of what the labels give each class, q, a row's loss is
sum(q) lse(z) - sum(q z) + z_loss lse(z)^2. Probabilities are q themselves. An index gives `hit` to
its class; smoothing gives every class a little more. A row whose index is ignore_index counts 0.

For backward is left of each row: its largest z, log(sum(exp(z - largest))) and sum(q).
"""

import triton
import triton.language as tl

from ._math import tanh


@triton.jit
def row_offsets(rows, n_inner, outer_stride, inner_stride):
    """Where rows begin. What follows the classes, such as pixels, is inside of what precedes."""
    outer, inner = (rows // n_inner).to(tl.int64), (rows % n_inner).to(tl.int64)
    return outer * outer_stride + inner * inner_stride


@triton.jit
def load_logits(ptrs, mask, softcap):
    """z in fp32. Lanes past the end are -inf, and their exponentials 0."""
    x = tl.load(ptrs, mask=mask, other=-float("inf")).to(tl.float32)
    return x if softcap is None else tl.where(mask, softcap * tanh(x / softcap), x)


@triton.jit
def load_index(target_ptr, weight_ptr, rows, inside, n_cols, ignore_index):
    """The class of each row, whether the row counts, and its weight: NaN where there is no such
    class, and so is the loss then.
    """
    index = tl.load(target_ptr + rows, mask=inside, other=0).to(tl.int64)
    kept = inside & (index != ignore_index)
    known = (index >= 0) & (index < n_cols)
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + index, mask=kept & known, other=0.0).to(tl.float32)
    return index, kept, tl.where(kept, tl.where(known, weight, float("nan")), 0.0)


@triton.jit
def shares(t_ptrs, weight_ptr, cols, mask, n_cols, smoothing, PROBS: tl.constexpr):
    """What labels give each class beside `hit`. Lanes past the end are 0, so sums need no mask."""
    q = tl.where(mask, 0.0, 0.0)
    if PROBS:
        q += tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32)
    if smoothing is not None:
        q = q * (1.0 - smoothing) + smoothing / n_cols
    if weight_ptr is not None:
        q *= tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    return tl.where(mask, q, 0.0)


@triton.jit
def reduce_row(
    x_ptrs, t_ptrs, weight_ptr, inside, n_cols, x_class, t_class, smoothing, softcap,
    PROBS: tl.constexpr, SPREAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest z, log(sum(exp(z - largest))), an origin, sum(q) and sum(q (z - origin)).

    The sum of q z is taken near 0, so that little is lost where all z are far from it.
    """
    largest = tl.full((ROWS, 1), -float("inf"), tl.float32)
    origin = tl.zeros((ROWS, 1), tl.float32)
    exps = tl.zeros((ROWS, BLOCK), tl.float32)
    dots = tl.zeros((ROWS, BLOCK), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        mask = inside & (cols < n_cols)
        far = cols.to(tl.int64)
        z = load_logits(x_ptrs + far * x_class, mask, softcap)
        before = largest
        largest = tl.maximum(largest, tl.max(z, axis=1)[:, None])
        # where all so far are -inf, there is nothing to be relative to
        low = tl.where(largest == -float("inf"), 0.0, largest)
        exps = exps * tl.exp(before - low) + tl.exp(z - low)
        if SPREAD:
            if start == 0:
                origin = low
            q = shares(t_ptrs + far * t_class, weight_ptr, cols, mask, n_cols, smoothing, PROBS)
            total += q
            dots += tl.where(mask, q * (z - origin), 0.0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    log_sum = tl.log(tl.sum(exps, axis=1)[:, None])
    if not SPREAD:
        origin = largest
    return largest, log_sum, origin, tl.sum(total, axis=1)[:, None], tl.sum(dots, axis=1)[:, None]


@triton.jit
def slope(
    z, largest, log_sum, total, q, index, hit, cols, z_loss, softcap, INDEX: tl.constexpr
):  # fmt: skip
    """The loss's derivative at the logits."""
    if z_loss is not None:
        total += 2.0 * z_loss * (largest + log_sum)
    dx = total * tl.exp((z - largest) - log_sum) - q
    if INDEX:
        dx = tl.where(cols == index, dx - hit, dx)
    return dx if softcap is None else dx * (1.0 - (z / softcap) * (z / softcap))


@triton.jit
def cross_entropy_fwd(
    x_ptr, target_ptr, weight_ptr, loss_ptr, row_weight_ptr, stats_ptr, dx_ptr,
    n_rows, n_cols, n_inner, x_outer, x_class, x_inner, t_outer, t_class, t_inner, stats_kind,
    ignore_index, smoothing, z_loss, softcap,
    PROBS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program has ROWS rows. With dx_ptr it leaves their gradient too, and that may be where
    the logits are.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = rows < n_rows
    x_offsets = row_offsets(rows, n_inner, x_outer, x_inner)
    x_ptrs = x_ptr + x_offsets
    t_ptrs = target_ptr + row_offsets(rows, n_inner, t_outer, t_inner)
    SPREAD: tl.constexpr = PROBS or smoothing is not None
    index, kept, weight = rows.to(tl.int64), inside, tl.where(inside, 1.0, 0.0)
    hit, z_hit = tl.where(inside, 0.0, 0.0), tl.where(inside, 0.0, 0.0)
    if not PROBS:
        index, kept, weight = load_index(target_ptr, weight_ptr, rows, inside, n_cols, ignore_index)
        hit = weight if smoothing is None else weight * (1.0 - smoothing)
        known = kept & (index >= 0) & (index < n_cols)
        # read before the gradient can be there
        z_hit = tl.where(known, load_logits(x_ptrs + index * x_class, known, softcap), 0.0)

    largest, log_sum, origin, total, dot = reduce_row(
        x_ptrs, t_ptrs, weight_ptr, inside, n_cols, x_class, t_class, smoothing, softcap,
        PROBS, SPREAD, ROWS, BLOCK,
    )  # fmt: skip
    total = tl.where(kept, total + hit, 0.0)
    loss = total * ((largest - origin) + log_sum) - dot
    if not PROBS:
        loss -= hit * (z_hit - origin)
    if z_loss is not None:
        loss += z_loss * (largest + log_sum) * (largest + log_sum)
    tl.store(loss_ptr + rows, tl.where(kept, loss, 0.0), mask=inside)
    if row_weight_ptr is not None:
        tl.store(row_weight_ptr + rows, weight, mask=inside)
    if stats_ptr is not None:
        tl.store(stats_ptr + rows, largest, mask=inside)
        stats_ptr += stats_kind
        tl.store(stats_ptr + rows, log_sum, mask=inside)
        stats_ptr += stats_kind
        tl.store(stats_ptr + rows, total, mask=inside)
    if dx_ptr is not None:
        for start in range(0, n_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)[None, :]
            mask = inside & (cols < n_cols)
            far = cols.to(tl.int64)
            z = load_logits(x_ptrs + far * x_class, mask, softcap)
            q = 0.0
            if SPREAD:
                q = shares(t_ptrs + far * t_class, weight_ptr, cols, mask, n_cols, smoothing, PROBS)
            dx = slope(z, largest, log_sum, total, q, index, hit, cols, z_loss, softcap, not PROBS)
            tl.store(dx_ptr + x_offsets + far * x_class, tl.where(kept, dx, 0.0), mask=mask)


@triton.jit
def cross_entropy_bwd(
    dloss_ptr, x_ptr, target_ptr, weight_ptr, stats_ptr, sums_ptr, dx_ptr, dtarget_ptr,
    n_rows, n_cols, n_inner, n_parts, x_outer, x_class, x_inner, t_outer, t_class, t_inner,
    dx_outer, dx_class, dx_inner, dt_outer, dt_class, dt_inner, dloss_row, stats_kind,
    ignore_index, smoothing, z_loss, softcap,
    PROBS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows have n_parts programs, each of them with one block of classes."""
    rows = (tl.program_id(0) // n_parts) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (tl.program_id(0) % n_parts) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = rows < n_rows
    mask = inside & (cols < n_cols)
    far = cols.to(tl.int64)
    largest = tl.load(stats_ptr + rows, mask=inside, other=0.0)
    stats_ptr += stats_kind
    log_sum = tl.load(stats_ptr + rows, mask=inside, other=0.0)
    stats_ptr += stats_kind
    total = tl.load(stats_ptr + rows, mask=inside, other=0.0)
    up = tl.load(dloss_ptr + rows * dloss_row, mask=inside, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        up /= tl.load(sums_ptr + 1)  # the mean's denominator

    z = load_logits(
        x_ptr + row_offsets(rows, n_inner, x_outer, x_inner) + far * x_class, mask, softcap
    )
    t_ptrs = target_ptr + row_offsets(rows, n_inner, t_outer, t_inner) + far * t_class
    index, kept, hit, q = rows, inside, 0.0, 0.0
    if not PROBS:
        index, kept, hit = load_index(target_ptr, weight_ptr, rows, inside, n_cols, ignore_index)
        hit = hit if smoothing is None else hit * (1.0 - smoothing)
    if PROBS or smoothing is not None:
        q = shares(t_ptrs, weight_ptr, cols, mask, n_cols, smoothing, PROBS)
    if dx_ptr is not None:
        dx = slope(z, largest, log_sum, total, q, index, hit, cols, z_loss, softcap, not PROBS)
        dx_ptrs = dx_ptr + row_offsets(rows, n_inner, dx_outer, dx_inner) + far * dx_class
        tl.store(dx_ptrs, tl.where(kept, dx * up, 0.0), mask=mask)
    if dtarget_ptr is not None:
        dt = up * (log_sum - (z - largest))
        if smoothing is not None:
            dt *= 1.0 - smoothing
        if weight_ptr is not None:
            dt *= tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        dt_ptrs = dtarget_ptr + row_offsets(rows, n_inner, dt_outer, dt_inner) + far * dt_class
        tl.store(dt_ptrs, dt, mask=mask)

"""Losses of each element of an input and a target, summed or left as they are.

LOSS names the loss; `a` is its parameter (beta, delta). A pos weight stands beside the target.
"""

import triton
import triton.language as tl

from ._math import softplus


@triton.jit
def loss_of(x, t, pos, LOSS: tl.constexpr, a):
    """The loss of x at target t."""
    d = x - t
    size = tl.abs(d)
    if LOSS == "mse":
        y = d * d
    elif LOSS == "l1":
        y = size
    elif LOSS == "smooth_l1":
        y = tl.where(size < a, 0.5 * d * d / a, size - 0.5 * a)
    elif LOSS == "huber":
        y = tl.where(size <= a, 0.5 * d * d, a * (size - 0.5 * a))
    elif LOSS == "kl":
        y = tl.where(t == 0, 0.0, t * tl.log(t)) - t * x
    elif LOSS == "kl_log":
        y = tl.exp(t) * (t - x)
    else:
        tl.static_assert(LOSS == "bce", "unknown loss")
        y = (1.0 - t) * x + ((pos - 1.0) * t + 1.0) * softplus(-x)
    return y


@triton.jit
def slopes_of(x, t, pos, LOSS: tl.constexpr, a):
    """The derivatives of the loss by x and by t."""
    d = x - t
    if LOSS == "mse":
        by_x = 2.0 * d
        by_t = -by_x
    elif LOSS == "l1":
        # NaN stays NaN
        by_x = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        by_t = -by_x
    elif LOSS == "smooth_l1":
        by_x = tl.where(d <= -a, -1.0, tl.where(d >= a, 1.0, d / a))
        by_t = -by_x
    elif LOSS == "huber":
        by_x = tl.where(d <= -a, -a, tl.where(d >= a, a, d))
        by_t = -by_x
    elif LOSS == "kl":
        by_x = -t
        # torch's is NaN at 0
        by_t = tl.log(t) + tl.where(t == 0, float("nan"), 1.0) - x
    elif LOSS == "kl_log":
        by_x = -tl.exp(t)
        by_t = tl.exp(t) * (t - x + 1.0)
    else:
        tl.static_assert(LOSS == "bce", "unknown loss")
        by_x = (pos * t + 1.0 - t) * tl.sigmoid(x) - pos * t
        by_t = (pos - 1.0) * softplus(-x) - x
    return by_x, by_t


@triton.jit
def load_factor(ptr, first, n, inner, size, BLOCK: tl.constexpr):
    """A block of a tensor that is repeated: `inner` neighbours share an element, and `size` of them
    come round again. Of a whole one, whose size is None, as it is. 1 where there is none.
    """
    if ptr is None:
        factor = 1.0
    elif size is None:
        at = first + tl.arange(0, BLOCK)
        factor = tl.load(ptr + at, mask=at < n, other=0.0).to(tl.float32)
    else:
        at = (first % (inner * size)).to(tl.int32) + tl.arange(0, BLOCK)
        factor = tl.load(ptr + at // inner % size).to(tl.float32)
    return factor


@triton.jit
def loss_fwd(
    x_ptr, t_ptr, weight_ptr, pos_ptr, y_ptr, sums_ptr,
    n, a, weight_inner, weight_size, pos_inner, pos_size,
    LOSS: tl.constexpr, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs take blocks of the flat tensors in turn. Each stores the losses, or leaves their sum
    and, BY_WEIGHT, that of the weights.
    """
    losses = tl.zeros((BLOCK,), dtype=tl.float32)
    weights = tl.zeros((BLOCK,), dtype=tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for at in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        first = tl.cast(at, tl.int64)
        cols = first + tl.arange(0, BLOCK)
        mask = cols < n
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        pos = load_factor(pos_ptr, first, n, pos_inner, pos_size, BLOCK)
        weight = load_factor(weight_ptr, first, n, weight_inner, weight_size, BLOCK)
        y = loss_of(x, t, pos, LOSS, a) * weight
        if sums_ptr is None:
            tl.store(y_ptr + cols, y, mask=mask)
        else:
            losses += tl.where(mask, y, 0.0)
            if BY_WEIGHT:
                weights += tl.where(mask, weight, 0.0)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(losses, axis=0))
        if BY_WEIGHT:
            tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(weights, axis=0))


@triton.jit
def loss_total(
    sums_ptr, y_ptr, divisor_ptr, n_sums, divisor, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """One program. The sum of the losses over the divisor, which is in units of the mean weight
    BY_WEIGHT and left for backward then.
    """
    cols = tl.arange(0, BLOCK)
    mask = cols < n_sums
    total = tl.sum(tl.load(sums_ptr + cols, mask=mask, other=0.0), axis=0)
    by = tl.cast(divisor, tl.float32)
    if BY_WEIGHT:
        by *= tl.sum(tl.load(sums_ptr + n_sums + cols, mask=mask, other=0.0), axis=0)
        tl.store(divisor_ptr, by)
    tl.store(y_ptr, total / by)


@triton.jit
def loss_bwd(
    dy_ptr, x_ptr, t_ptr, weight_ptr, pos_ptr, divisor_ptr, dx_ptr, dt_ptr,
    n, a, divisor, weight_inner, weight_size, pos_inner, pos_size,
    LOSS: tl.constexpr, REDUCED: tl.constexpr, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of the flat tensors. REDUCED: there is one dy for all of them."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n
    if REDUCED:
        by = tl.load(divisor_ptr) if BY_WEIGHT else tl.cast(divisor, tl.float32)
        dy = tl.load(dy_ptr).to(tl.float32) / by
    else:
        dy = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    pos = load_factor(pos_ptr, first, n, pos_inner, pos_size, BLOCK)
    dy *= load_factor(weight_ptr, first, n, weight_inner, weight_size, BLOCK)
    by_x, by_t = slopes_of(x, t, pos, LOSS, a)
    if dx_ptr is not None:
        tl.store(dx_ptr + cols, dy * by_x, mask=mask)
    if dt_ptr is not None:
        tl.store(dt_ptr + cols, dy * by_t, mask=mask)

"""Normalization of channels in tiles [channels, pixels] of one sample, over any of its layouts:
y = act(x_hat factor + offset + residual).

A statistic is of some channels of a sample (group normalization), or of one channel of the whole
batch: stat_n, the statistics from a sample to the next, is 0 then. Pixels are split among programs,
so that few statistics fill a device too; a second kernel puts their parts together. Parts of a
statistic lie side by side.
"""

import triton
import triton.language as tl

from ._channels import gradient, load_factors, load_moments
from ._math import activate
from ._rows import combine, load_tile


@triton.jit
def block_of(n_channels, n_splits, BLOCK_C: tl.constexpr):
    """This program's sample, channels and share of the pixels."""
    split = tl.program_id(0) % n_splits
    block = tl.program_id(0) // n_splits
    blocks = tl.cdiv(n_channels, BLOCK_C)
    channels = (block % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    return (block // blocks).to(tl.int64), channels, split


@triton.jit
def channelnorm_moments(
    x_ptr, parts_ptr,
    n_channels, n_pixels, x_n, x_c, x_p, n_splits, chunk, part_n, part_c, n_parts,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per chunk of pixels of some channels: their means, and after n_parts of these
    their summed squares of deviation.
    """
    sample, channels, split = block_of(n_channels, n_splits, BLOCK_C)
    inside = channels < n_channels
    x_ptr += sample * x_n + channels * x_c
    start = split * chunk
    end = tl.minimum(start + chunk, n_pixels)
    # moments of the distance from the first pixel: a mean far from 0 costs no digits
    origin = load_tile(x_ptr, tl.cast(start, tl.int64) * x_p, inside)
    mean = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    seen = 0.0
    for first in range(start, end, BLOCK_P):
        pixels = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[None, :]
        mask = inside & (pixels < end)
        x = load_tile(x_ptr, pixels * x_p, mask) - origin
        # Welford's update, each lane for itself
        seen += 1.0
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / seen)
        m2 += delta * (x - mean)
    lanes = tl.arange(0, BLOCK_P)[None, :]
    counts = tl.maximum(tl.cdiv(end - start - lanes, BLOCK_P), 0).to(tl.float32)
    merged = tl.sum(mean * counts, axis=1)[:, None] / (end - start)
    deviation = mean - merged
    m2 = tl.sum(m2 + counts * deviation * deviation, axis=1)[:, None]
    parts = parts_ptr + sample * part_n + channels * part_c + split
    tl.store(parts, origin + merged, mask=inside)
    tl.store(parts + n_parts, m2, mask=inside)


@triton.jit
def channelnorm_merge(
    parts_ptr, mean_ptr, var_ptr, unbiased_ptr,
    n_pixels, n_splits, chunk, stat_parts, n_parts, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per statistic."""
    stat = tl.program_id(0).to(tl.int64)
    parts_ptr += stat * stat_parts
    one = tl.zeros((1,), dtype=tl.int64)
    origin = tl.load(parts_ptr + one)
    mean = tl.zeros((1,), dtype=tl.float32)
    m2 = tl.zeros((1,), dtype=tl.float32)
    seen = tl.zeros((1,), dtype=tl.float32)
    for first in range(0, stat_parts, BLOCK):
        parts = first + tl.arange(0, BLOCK)
        mask = parts < stat_parts
        # the last chunk of a sample may be shorter; parts past the end count nothing
        counts = tl.minimum(n_pixels - parts % n_splits * chunk, chunk)
        counts = tl.where(mask, counts, 0).to(tl.float32)
        means = tl.load(parts_ptr + parts, mask=mask, other=0.0) - origin
        n_new = tl.sum(counts, axis=0)
        new_mean = tl.sum(counts * means, axis=0) / n_new
        deviation = means - new_mean
        new_m2 = tl.load(parts_ptr + n_parts + parts, mask=mask, other=0.0)
        new_m2 = tl.sum(new_m2 + counts * deviation * deviation, axis=0)
        mean, m2, seen = combine(mean, m2, seen, new_mean, new_m2, n_new)
    tl.store(mean_ptr + stat + one, origin + mean)
    tl.store(var_ptr + stat + one, m2 / count)
    if unbiased_ptr is not None:
        tl.store(unbiased_ptr + stat + one, m2 / (count - 1.0))


@triton.jit
def channelnorm_fwd(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, var_ptr, y_ptr,
    n_channels, n_pixels, x_n, x_c, x_p, n_blocks, stat_n, group_channels,
    scale_n, scale_c, shift_n, shift_c, eps, a, b,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per tile."""
    sample, channels, block = block_of(n_channels, n_blocks, BLOCK_C)
    inside = channels < n_channels
    pixels = block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside & (pixels < n_pixels)
    offsets = sample * x_n + channels * x_c + pixels * x_p
    stat = sample * stat_n + channels // group_channels
    mean, rstd = load_moments(mean_ptr, var_ptr, stat, inside, eps)
    factor, offset = load_factors(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channels, inside,
        scale_n, scale_c, shift_n, shift_c,
    )  # fmt: skip
    z = (load_tile(x_ptr, offsets, mask) - mean) * rstd * factor + offset
    if residual_ptr is not None:
        z += load_tile(residual_ptr, offsets, mask)
    tl.store(y_ptr + offsets, activate(z, ACT, a, b), mask=mask)


@triton.jit
def channelnorm_affine(
    weight_ptr, bias_ptr, mean_ptr, var_ptr, before_ptr, out_ptr,
    n_channels, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The norm of x + before is x scale + shift: scales of all channels, then their shifts."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < n_channels
    mean, rstd = load_moments(mean_ptr, var_ptr, channels, mask, eps)
    factor, offset = load_factors(
        weight_ptr, bias_ptr, None, None, 0, channels, mask, 0, 0, 0, 0
    )  # fmt: skip
    if before_ptr is not None:
        mean -= load_tile(before_ptr, channels, mask)
    tl.store(out_ptr + channels, rstd * factor, mask=mask)
    tl.store(out_ptr + n_channels + channels, offset - mean * rstd * factor, mask=mask)


@triton.jit
def channelnorm_sums(
    dy_ptr, x_ptr, z_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, var_ptr,
    g_ptr, parts_ptr,
    n_channels, n_pixels, x_n, x_c, x_p, n_splits, chunk, part_n, part_c, n_parts,
    stat_n, group_channels, scale_n, scale_c, shift_n, shift_c, eps, a, b,
    ACT: tl.constexpr, FROM_Y: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per chunk of pixels of some channels: sums of g, and after n_parts of these of
    g x_hat. Leaves g too if somebody wants it.
    """
    sample, channels, split = block_of(n_channels, n_splits, BLOCK_C)
    inside = channels < n_channels
    stat = sample * stat_n + channels // group_channels
    mean, rstd = load_moments(mean_ptr, var_ptr, stat, inside, eps)
    factor, offset = load_factors(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channels, inside,
        scale_n, scale_c, shift_n, shift_c,
    )  # fmt: skip
    g_sum = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    g_x_hat_sum = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    end = tl.minimum(split * chunk + chunk, n_pixels)
    for first in range(split * chunk, end, BLOCK_P):
        pixels = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[None, :]
        mask = inside & (pixels < end)
        offsets = sample * x_n + channels * x_c + pixels * x_p
        x_hat = (load_tile(x_ptr, offsets, mask) - mean) * rstd
        g = gradient(dy_ptr, z_ptr, x_hat, factor, offset, offsets, mask, a, b, ACT, FROM_Y)
        if g_ptr is not None:
            tl.store(g_ptr + offsets, g, mask=mask)
        g_sum += g
        g_x_hat_sum += g * x_hat
    parts = parts_ptr + sample * part_n + channels * part_c + split
    tl.store(parts, tl.sum(g_sum, axis=1)[:, None], mask=inside)
    tl.store(parts + n_parts, tl.sum(g_x_hat_sum, axis=1)[:, None], mask=inside)


@triton.jit
def channelnorm_merge_sums(
    parts_ptr, weight_ptr, scale_ptr, sums_ptr, means_ptr,
    n_groups, group_channels, channel_parts, n_parts, n_sums, n_stats,
    scale_n, scale_c, count,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per statistic: the sums of its channels, and their means over all of it, each
    channel times its factor.
    """
    stat = tl.program_id(0).to(tl.int64)
    g_mean = tl.zeros((BLOCK_C, 1), dtype=tl.float32)
    g_x_hat_mean = tl.zeros((BLOCK_C, 1), dtype=tl.float32)
    for first_channel in range(0, group_channels, BLOCK_C):
        within = first_channel + tl.arange(0, BLOCK_C)[:, None]
        inside = within < group_channels
        rows = stat * group_channels + within
        g_sum = tl.zeros((BLOCK_C, BLOCK), dtype=tl.float32)
        g_x_hat_sum = tl.zeros((BLOCK_C, BLOCK), dtype=tl.float32)
        for first in range(0, channel_parts, BLOCK):
            parts = first + tl.arange(0, BLOCK)[None, :]
            mask = inside & (parts < channel_parts)
            at = rows * channel_parts + parts
            g_sum += load_tile(parts_ptr, at, mask)
            g_x_hat_sum += load_tile(parts_ptr + n_parts, at, mask)
        g_total = tl.sum(g_sum, axis=1)[:, None]
        g_x_hat_total = tl.sum(g_x_hat_sum, axis=1)[:, None]
        tl.store(sums_ptr + rows, g_total, mask=inside)
        tl.store(sums_ptr + n_sums + rows, g_x_hat_total, mask=inside)
        channels = stat % n_groups * group_channels + within
        factor, _ = load_factors(
            weight_ptr, None, scale_ptr, None, stat // n_groups, channels, inside,
            scale_n, scale_c, 0, 0,
        )  # fmt: skip
        # sums past the end are 0
        g_mean += factor * g_total
        g_x_hat_mean += factor * g_x_hat_total
    if means_ptr is not None:
        one = tl.zeros((1,), dtype=tl.int64)
        tl.store(means_ptr + stat + one, tl.sum(g_mean, axis=0) / count)
        tl.store(means_ptr + n_stats + stat + one, tl.sum(g_x_hat_mean, axis=0) / count)


@triton.jit
def channelnorm_dx(
    dy_ptr, x_ptr, z_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, var_ptr,
    means_ptr, dx_ptr, g_ptr,
    n_channels, n_pixels, x_n, x_c, x_p, n_blocks, stat_n, group_channels, n_stats,
    scale_n, scale_c, shift_n, shift_c, eps, a, b,
    ACT: tl.constexpr, FROM_Y: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per tile. Statistics that do not depend on x have no means of g."""
    sample, channels, block = block_of(n_channels, n_blocks, BLOCK_C)
    inside = channels < n_channels
    pixels = block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside & (pixels < n_pixels)
    offsets = sample * x_n + channels * x_c + pixels * x_p
    stat = sample * stat_n + channels // group_channels
    mean, rstd = load_moments(mean_ptr, var_ptr, stat, inside, eps)
    factor, offset = load_factors(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channels, inside,
        scale_n, scale_c, shift_n, shift_c,
    )  # fmt: skip
    x_hat = (load_tile(x_ptr, offsets, mask) - mean) * rstd
    g = gradient(dy_ptr, z_ptr, x_hat, factor, offset, offsets, mask, a, b, ACT, FROM_Y)
    if g_ptr is not None:
        tl.store(g_ptr + offsets, g, mask=mask)
    if dx_ptr is not None:
        dx = g * factor
        if means_ptr is not None:
            dx -= load_tile(means_ptr, stat, inside)
            dx -= x_hat * load_tile(means_ptr + n_stats, stat, inside)
        tl.store(dx_ptr + offsets, dx * rstd, mask=mask)

"""Group normalization of channels in front: y = act(x_hat factor + offset + residual), the groups
[channels, pixels] of a sample whole in registers.

Larger groups, channels behind the pixels, and statistics of a whole batch are in channelnorm.py.
"""

import triton
import triton.language as tl

from ._channels import gradient, load_factors
from ._math import activate
from ._rows import load_tile


@triton.jit
def group_sum(x):
    """The sum of each group of a tile [groups, channels, pixels]."""
    return tl.sum(tl.sum(x, axis=2), axis=1)[:, None, None]


@triton.jit
def tile_of(
    n_rows, group_channels, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """This program's groups of all samples, the channels within a group, the pixels, and which of
    the channels are there.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    within = tl.arange(0, BLOCK_C)[None, :, None]
    pixels = tl.arange(0, BLOCK_P)[None, None, :]
    return rows, within, pixels, (rows < n_rows) & (within < group_channels)


@triton.jit
def groupnorm_fwd(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, var_ptr,
    n_rows, n_groups, group_channels, n_pixels, scale_n, scale_c, shift_n, shift_c, eps, a, b,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per ROWS groups. Leaves mean and variance, in fp32, for backward."""
    rows, within, pixels, inside = tile_of(n_rows, group_channels, ROWS, BLOCK_C, BLOCK_P)
    mask = inside & (pixels < n_pixels)
    offsets = (rows * group_channels + within) * n_pixels + pixels
    count = group_channels * n_pixels
    x = load_tile(x_ptr, offsets, mask)
    mean = group_sum(x) / count
    centered = tl.where(mask, x - mean, 0.0)
    var = group_sum(centered * centered) / count
    factor, offset = load_factors(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr,
        rows // n_groups, rows % n_groups * group_channels + within, inside,
        scale_n, scale_c, shift_n, shift_c,
    )  # fmt: skip
    z = centered * tl.rsqrt(var + eps) * factor + offset
    if residual_ptr is not None:
        z += load_tile(residual_ptr, offsets, mask)
    tl.store(y_ptr + offsets, activate(z, ACT, a, b), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(var_ptr + rows, var, mask=rows < n_rows)


@triton.jit
def groupnorm_bwd(
    dy_ptr, x_ptr, z_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, var_ptr,
    dx_ptr, g_ptr, sums_ptr,
    n_rows, n_groups, group_channels, n_pixels, scale_n, scale_c, shift_n, shift_c, eps, a, b,
    ACT: tl.constexpr, FROM_Y: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per ROWS groups. Leaves the sums of g and of g x_hat of every channel."""
    rows, within, pixels, inside = tile_of(n_rows, group_channels, ROWS, BLOCK_C, BLOCK_P)
    mask = inside & (pixels < n_pixels)
    channel_rows = rows * group_channels + within
    offsets = channel_rows * n_pixels + pixels
    mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + rows, mask=rows < n_rows, other=1.0) + eps)
    factor, offset = load_factors(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr,
        rows // n_groups, rows % n_groups * group_channels + within, inside,
        scale_n, scale_c, shift_n, shift_c,
    )  # fmt: skip
    x_hat = (load_tile(x_ptr, offsets, mask) - mean) * rstd
    g = gradient(dy_ptr, z_ptr, x_hat, factor, offset, offsets, mask, a, b, ACT, FROM_Y)
    if g_ptr is not None:
        tl.store(g_ptr + offsets, g, mask=mask)
    g_sum = tl.sum(g, axis=2)[:, :, None]
    g_x_hat_sum = tl.sum(g * x_hat, axis=2)[:, :, None]
    if sums_ptr is not None:
        tl.store(sums_ptr + channel_rows, g_sum, mask=inside)
        second = tl.cast(n_rows, tl.int64) * group_channels
        tl.store(sums_ptr + second + channel_rows, g_x_hat_sum, mask=inside)
    if dx_ptr is not None:
        count = group_channels * n_pixels
        # a factor past the end is not 0 where there is no weight, but the sums are
        g_mean = group_sum(factor * g_sum) / count
        g_x_hat_mean = group_sum(factor * g_x_hat_sum) / count
        dx = rstd * (g * factor - g_mean - x_hat * g_x_hat_mean)
        tl.store(dx_ptr + offsets, dx, mask=mask)

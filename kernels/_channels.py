"""Device functions shared by kernels that normalize the channels of pixels."""

import triton
import triton.language as tl

from ._math import derivative
from ._rows import load_tile


@triton.jit
def load_factors(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channels, mask,
    scale_n, scale_c, shift_n, shift_c,
):  # fmt: skip
    """factor and offset of x_hat factor + offset: weight and bias, then 1 + scale and shift."""
    offset = tl.zeros(channels.shape, dtype=tl.float32)
    factor = offset + 1.0
    if weight_ptr is not None:
        factor = load_tile(weight_ptr, channels, mask)
    if bias_ptr is not None:
        offset = load_tile(bias_ptr, channels, mask)
    if scale_ptr is not None:
        scale = 1.0 + load_tile(scale_ptr, sample * scale_n + channels * scale_c, mask)
        factor *= scale
        offset *= scale
    if shift_ptr is not None:
        offset += load_tile(shift_ptr, sample * shift_n + channels * shift_c, mask)
    return factor, offset


@triton.jit
def load_moments(mean_ptr, var_ptr, at, mask, eps):
    """mean and rstd. A variance of 1 past the end keeps the root finite there."""
    mean = tl.load(mean_ptr + at, mask=mask, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + at, mask=mask, other=1.0).to(tl.float32)
    return mean, tl.rsqrt(var + eps)


@triton.jit
def gradient(
    dy_ptr, z_ptr, x_hat, factor, offset, offsets, mask, a, b,
    ACT: tl.constexpr, FROM_Y: tl.constexpr,
):  # fmt: skip
    """g = dy act'(z) of z = x_hat factor + offset + residual; z_ptr has the residual, or act(z)
    where the derivative can be taken there. Lanes past the end are 0, so sums need no mask.
    """
    g = load_tile(dy_ptr, offsets, mask)
    if ACT != "none":
        z = x_hat * factor + offset
        if FROM_Y:
            z = load_tile(z_ptr, offsets, mask)
        elif z_ptr is not None:
            z += load_tile(z_ptr, offsets, mask)
        g = tl.where(mask, g * derivative(z, ACT, a, b), 0.0)
    return g

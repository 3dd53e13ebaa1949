"""The gradients of a causal convolution in which each channel has its own taps. Its forward is that
of depthwise convolutions.
"""

import triton
import triton.language as tl

from ._math import derivative


@triton.jit
def causal_conv1d_bwd(
    dy_ptr, z_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    n_images, length, dy_length, N, padding,
    x_image, x_channel, x_col, y_channel, y_col, dx_channel, dx_col, a, b,
    ACT: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx[i] = sum_k w[k] dz[i + padding - k], with dz = act'(z) dy. A program takes every P-th
    block of positions of one block of channels, and leaves partial sums; TAPS is K, rounded up.
    The weight is [K, N].
    """
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    taps = tl.arange(0, TAPS)
    part = tl.program_id(1)
    n_rows = tl.cdiv(length, BLOCK_M)

    dweight = tl.zeros((TAPS, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for block in range(part, n_images * n_rows, tl.num_programs(1)):
        image = tl.cast(block // n_rows, tl.int64)
        rows = tl.cast(block % n_rows, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < length)[:, None] & (cols < N)[None, :]
        x_ptrs = x_ptr + image * x_image + (rows[:, None] * x_col + cols[None, :] * x_channel)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.static_range(K):
            to = rows + padding - k
            seen = mask & ((to >= 0) & (to < dy_length))[:, None]
            offsets = image * dy_length * N + to[:, None] * y_col + cols[None, :] * y_channel
            # dy is 0 where there is no output, so the sums need no mask
            dz = tl.load(dy_ptr + offsets, mask=seen, other=0.0).to(tl.float32)
            if ACT != "none":
                z = tl.load(z_ptr + offsets, mask=seen, other=0.0).to(tl.float32)
                dz *= derivative(z, ACT, a, b)
            weight = tl.load(weight_ptr + k * N + cols, mask=cols < N, other=0.0).to(tl.float32)
            dx += dz * weight[None, :]
            if dweight_ptr is not None:
                dweight += tl.where((taps == k)[:, None], tl.sum(dz * x, axis=0)[None, :], 0.0)
            # the last tap reaches every output once
            if k == K - 1:
                dbias += tl.sum(dz, axis=0)
        if dx_ptr is not None:
            offsets = image * length * N + rows[:, None] * dx_col + cols[None, :] * dx_channel
            tl.store(dx_ptr + offsets, dx, mask=mask)
    if dweight_ptr is not None:
        offsets = (part.to(tl.int64) * K + taps)[:, None] * N + cols[None, :]
        tl.store(dweight_ptr + offsets, dweight, mask=(taps < K)[:, None] & (cols < N)[None, :])
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part.to(tl.int64) * N + cols, dbias, mask=cols < N)

"""Convolutions as products of gathered rows, and those in which each channel has its own taps."""

import triton
import triton.language as tl

from .finish import finish, offsets_of, with_bias
from .linear import split, tile_of


@triton.jit
def conv_fwd(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr,
    n_images, M, N, C, H, W, width, x_image, x_channel, x_row, x_col,
    stride_h, stride_w, pad_h, pad_w, apart_h, apart_w, a, b,
    ACT: tl.constexpr, PRECISION: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program per tile of positions and channels of a group. M is positions of an image, N and
    C are channels out and in of a group, the weight is [out, KH, KW, in].
    """
    total = n_images * M
    block_m, block_n = tile_of(tl.program_id(0), total, N, BLOCK_M, BLOCK_N, GROUP)
    group, n_groups = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image, position = (rows // M).to(tl.int64), rows % M
    top = position // width * stride_h - pad_h
    left = position % width * stride_w - pad_w
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)

    x_rows = x_ptr + image * x_image + group * C * x_channel
    w_rows = weight_ptr + (group * N + cols) * (KH * KW * C)
    steps = tl.cdiv(C, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(KH * KW * steps):
        tap = step // steps
        channels = step % steps * BLOCK_K + ks
        h, w = top + tap // KW * apart_h, left + tap % KW * apart_w
        # zeros of the padding, and past the last channel, add nothing
        seen = (rows < total) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x = tl.load(
            (x_rows + h * x_row + w * x_col)[:, None] + channels[None, :] * x_channel,
            mask=seen[:, None] & (channels < C)[None, :],
            other=0.0,
        )
        weight = tl.load(
            w_rows[:, None] + (tap * C + channels)[None, :],
            mask=(cols < N)[:, None] & (channels < C)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, weight.T, acc, input_precision=PRECISION)

    # by halves: a residual of a whole tile does not fit in registers beside it
    halves = split(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(2):
        cols = block_n * BLOCK_N + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = (rows < total)[:, None] & (cols < N)[None, :]
        outs = group * N + cols
        finish(
            with_bias(halves[i], scale_ptr, bias_ptr, outs, cols < N),
            offsets_of(image[:, None], position, outs, M, n_groups * N, PLANES), mask,
            rows, 0, residual_ptr, None, y_ptr, z_ptr,
            a, b, 0.0,
            ACT, True, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit
def depthwise_fwd(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr,
    M, N, H, W, width, x_image, x_channel, x_row, x_col,
    stride_h, stride_w, pad_h, pad_w, apart_h, apart_w, a, b,
    ACT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MULTIPLE: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per tile of positions and channels of an image. Channel c of N reads channel
    c // MULTIPLE; the weight is [KH, KW, N].
    """
    n_cols, n_rows = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    image = (tile // n_cols // n_rows).to(tl.int64)
    rows = tile // n_cols % n_rows * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % n_cols * BLOCK_N + tl.arange(0, BLOCK_N)
    top = rows // width * stride_h - pad_h
    left = rows % width * stride_w - pad_w

    x_cols = x_ptr + image * x_image + cols // MULTIPLE * x_channel
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for kh in range(KH):
        h = top + kh * apart_h
        for kw in tl.static_range(KW):
            w = left + kw * apart_w
            # zeros of the padding add nothing
            seen = (rows < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x = tl.load(
                x_cols[None, :] + (h * x_row + w * x_col)[:, None],
                mask=seen[:, None] & (cols < N)[None, :],
                other=0.0,
            )
            taps = weight_ptr + (kh * KW + kw) * N + cols
            weight = tl.load(taps, mask=cols < N, other=0.0)
            acc += x.to(tl.float32) * weight.to(tl.float32)[None, :]

    mask = (rows < M)[:, None] & (cols < N)[None, :]
    finish(
        with_bias(acc, scale_ptr, bias_ptr, cols, cols < N),
        offsets_of(image, rows, cols, M, N, PLANES), mask,
        rows, 0, residual_ptr, None, y_ptr, z_ptr,
        a, b, 0.0,
        ACT, True, BLOCK_N,
    )  # fmt: skip

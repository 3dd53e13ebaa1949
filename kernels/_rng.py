"""Dropout masks from Philox: element (row, col) has its own counter, so backward draws the mask
again.
"""

import triton
import triton.language as tl


@triton.jit
def dropout(x, seed_ptr, rows, first_col, p, BLOCK: tl.constexpr):
    """Drop elements of x with probability p and scale the rest. x is rows [R, 1] by BLOCK columns
    from first_col.

    One Philox call serves four neighbours, so first_col and BLOCK are multiples of 4.
    """
    quads = first_col // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)[None, :]
    low, high = (quads & 0xFFFFFFFF).to(tl.uint32), (quads >> 32).to(tl.uint32)
    row_low, row_high = (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), low, high, row_low, row_high)
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(x.shape)
    # 24 bits are exact in fp32, so that torch draws the same mask
    keep = (bits >> 8).to(tl.float32) * (1.0 / (1 << 24)) >= p
    return tl.where(keep, x / (1.0 - p), 0.0)

"""Device functions shared by kernels that normalize rows."""

import triton
import triton.language as tl


@triton.jit
def load_columns(ptr, cols, n_cols):
    """Read one vector of columns in fp32, as a row. Lanes past the end are 0."""
    return tl.load(ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_weight(ptr, cols, n_cols, offset):
    """weight + offset of the columns, as a row."""
    weight = load_columns(ptr, cols, n_cols)
    return weight if offset is None else weight + offset


@triton.jit
def rounded(x, cast_ptr):
    """x rounded to what cast_ptr points to, in fp32. Without it, x."""
    return x if cast_ptr is None else x.to(cast_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def load_tile(ptr, offsets, mask):
    """Read a tile in fp32. Lanes past the end are 0, so sums need no second mask."""
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_sum(x_ptr, x_offsets, residual_ptr, residual_offsets, mask):
    """h = x + residual, rounded as it would be stored, in fp32. Without a residual, x."""
    h = load_tile(x_ptr, x_offsets, mask)
    if residual_ptr is not None:
        h += load_tile(residual_ptr, residual_offsets, mask)
        h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def row_mean(x, n_cols):
    return tl.sum(x, axis=1)[:, None] / n_cols


@triton.jit
def combine(mean, m2, count, new_mean, new_m2, n_new):
    """Mean and summed squares of deviation of two sets together (Chan's update)."""
    delta = new_mean - mean
    total = count + n_new
    mean += delta * (n_new / total)
    m2 += new_m2 + delta * delta * (count * n_new / total)
    return mean, m2, total


@triton.jit
def merge_moments(mean, m2, count, x, mask, n_new):
    """Mean and summed squares of deviation of rows after n_new more columns."""
    new_mean = tl.sum(x, axis=1)[:, None] / n_new
    deviation = tl.where(mask, x - new_mean, 0.0)
    new_m2 = tl.sum(deviation * deviation, axis=1)[:, None]
    return combine(mean, m2, count, new_mean, new_m2, n_new)

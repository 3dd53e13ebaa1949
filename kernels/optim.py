"""Steps of optimizers, over many tensors in one launch.

A table of int64 has a row for each tensor: the number of its first program, how many elements it
has, and the addresses of parameter, gradient and state. What no tensor has is an address of 0.
Tensors without elements, `*_like`, say which types the addresses lead to.
"""

import triton
import triton.language as tl

from ._math import expm1


@triton.jit
def _find_block(table_ptr, tensor_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The row of this program's tensor, its first element there, and how many the tensor has."""
    pid = tl.program_id(0)
    row_ptr = table_ptr + tl.load(tensor_ptr + pid).to(tl.int64) * COLUMNS
    return row_ptr, (pid - tl.load(row_ptr)) * BLOCK, tl.load(row_ptr + 1)


@triton.jit
def _pointers(row_ptr, column: tl.constexpr, like_ptr, cols, WIDE: tl.constexpr):
    ptr = tl.load(row_ptr + column).to(like_ptr.dtype)
    if WIDE:
        ptr = tl.multiple_of(ptr, 16)
    return ptr + cols


@triton.jit
def _read(ptrs, mask):
    """In fp32; a whole block needs no mask."""
    values = tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _may_be_wide(row_ptr, start, n, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the block is whole and all its addresses allow 16-byte accesses."""
    addresses = tl.load(row_ptr + 2)
    for column in tl.static_range(3, COLUMNS):
        addresses |= tl.load(row_ptr + column)
    return (start + BLOCK <= n) & (addresses % 16 == 0)


@triton.jit
def _gradient(g_ptrs, mask, grad_scale_ptr, clip_ptr, MAXIMIZE: tl.constexpr):
    """What the step sees of the gradient. Without its scale it is also what the user finds."""
    g = _read(g_ptrs, mask)
    if grad_scale_ptr is not None:
        g = g / tl.load(grad_scale_ptr)
        tl.store(g_ptrs, g, mask=mask)
    if clip_ptr is not None:
        g *= tl.load(clip_ptr)
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def _read_parameter(p_like, p_ptrs, master_ptrs, mask, MASTER: tl.constexpr):
    """What p is the rounding of. If it is not, somebody has written it: it counts, then."""
    p = _read(p_ptrs, mask)
    if MASTER:
        master = _read(master_ptrs, mask)
        p = tl.where(master.to(p_like.dtype.element_ty).to(tl.float32) == p, master, p)
    return p


@triton.jit
def _store_parameter(p, p_ptrs, master_ptrs, mask, MASTER: tl.constexpr):
    tl.store(p_ptrs, p, mask=mask)
    if MASTER:
        tl.store(master_ptrs, p, mask=mask)


@triton.jit
def _adamw_block(
    p_like, g_like, m_like, row_ptr, cols, mask, grad_scale_ptr, clip_ptr,
    lr, correction1, correction2, rest1, beta2, rest2, eps, weight_decay,
    AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, MASTER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    p_ptrs = _pointers(row_ptr, 2, p_like, cols, WIDE)
    m_ptrs = _pointers(row_ptr, 4, m_like, cols, WIDE)
    v_ptrs = _pointers(row_ptr, 5, m_like, cols, WIDE)
    master_ptrs = p_ptrs
    if MASTER:
        master_ptrs = _pointers(row_ptr, 7, m_like, cols, WIDE)
    g_ptrs = _pointers(row_ptr, 3, g_like, cols, WIDE)
    p = _read_parameter(p_like, p_ptrs, master_ptrs, mask, MASTER)
    m = _read(m_ptrs, mask)
    v = _read(v_ptrs, mask)
    g = _gradient(g_ptrs, mask, grad_scale_ptr, clip_ptr, MAXIMIZE)

    # as torch's lerp: what is all gradient is the gradient
    m = tl.where(rest1 < 0.5, m + rest1 * (g - m), g - (1 - rest1) * (g - m))
    v = beta2 * v + rest2 * g * g
    tl.store(m_ptrs, m, mask=mask)
    tl.store(v_ptrs, v, mask=mask)
    if AMSGRAD:
        top_ptrs = _pointers(row_ptr, 6, m_like, cols, WIDE)
        top = _read(top_ptrs, mask)
        v = tl.where((v > top) | (v != v), v, top)
        tl.store(top_ptrs, v, mask=mask)
    p *= 1 - lr * weight_decay
    p -= lr / correction1 * (m / (tl.sqrt(v) / tl.sqrt(correction2) + eps))
    _store_parameter(p, p_ptrs, master_ptrs, mask, MASTER)


@triton.jit
def adamw_step(
    p_like, g_like, m_like, table_ptr, tensor_ptr, lr_ptr, grad_scale_ptr, found_inf_ptr, clip_ptr,
    lr, correction1, correction2, log_beta1, log_beta2, rest1, beta2, rest2, eps, weight_decay,
    AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, MASTER: tl.constexpr, COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a tensor. With COUNTED the tensor's own count of steps, on the
    device, corrects the bias."""
    row_ptr, start, n = _find_block(table_ptr, tensor_ptr, 9, BLOCK)
    cols = start + tl.arange(0, BLOCK)
    if found_inf_ptr is not None:
        n = tl.where(tl.load(found_inf_ptr) == 0, n, 0)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    if COUNTED:
        step = tl.load(tl.load(row_ptr + 8).to(tl.pointer_type(tl.float32)))
        correction1 = -expm1(step * log_beta1)
        correction2 = -expm1(step * log_beta2)
    if _may_be_wide(row_ptr, start, n, 8, BLOCK):
        _adamw_block(
            p_like, g_like, m_like, row_ptr, cols, None, grad_scale_ptr, clip_ptr,
            lr, correction1, correction2, rest1, beta2, rest2, eps, weight_decay,
            AMSGRAD, MAXIMIZE, MASTER, True,
        )  # fmt: skip
    else:
        _adamw_block(
            p_like, g_like, m_like, row_ptr, cols, cols < n, grad_scale_ptr, clip_ptr,
            lr, correction1, correction2, rest1, beta2, rest2, eps, weight_decay,
            AMSGRAD, MAXIMIZE, MASTER, False,
        )  # fmt: skip


@triton.jit
def _sgd_block(
    p_like, g_like, m_like, row_ptr, cols, mask, grad_scale_ptr, clip_ptr,
    lr, momentum, rest, weight_decay,
    MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    MASTER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    p_ptrs = _pointers(row_ptr, 2, p_like, cols, WIDE)
    master_ptrs = p_ptrs
    if MASTER:
        master_ptrs = _pointers(row_ptr, 5, m_like, cols, WIDE)
    g_ptrs = _pointers(row_ptr, 3, g_like, cols, WIDE)
    p = _read_parameter(p_like, p_ptrs, master_ptrs, mask, MASTER)
    g = _gradient(g_ptrs, mask, grad_scale_ptr, clip_ptr, MAXIMIZE)
    # torch leaves it out too: 0 times infinity is not 0
    g += tl.where(weight_decay != 0, weight_decay * p, 0.0)
    if MOMENTUM:
        m_ptrs = _pointers(row_ptr, 4, m_like, cols, WIDE)
        m = g
        if not FIRST:
            m = momentum * _read(m_ptrs, mask) + rest * g
        tl.store(m_ptrs, m, mask=mask)
        if NESTEROV:
            g += momentum * m
        else:
            g = m
    _store_parameter(p - lr * g, p_ptrs, master_ptrs, mask, MASTER)


@triton.jit
def sgd_step(
    p_like, g_like, m_like, table_ptr, tensor_ptr, lr_ptr, grad_scale_ptr, found_inf_ptr, clip_ptr,
    lr, momentum, rest, weight_decay,
    MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a tensor. FIRST fills the momentum with the gradient."""
    row_ptr, start, n = _find_block(table_ptr, tensor_ptr, 6, BLOCK)
    cols = start + tl.arange(0, BLOCK)
    if found_inf_ptr is not None:
        n = tl.where(tl.load(found_inf_ptr) == 0, n, 0)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    if _may_be_wide(row_ptr, start, n, 6, BLOCK):
        _sgd_block(
            p_like, g_like, m_like, row_ptr, cols, None, grad_scale_ptr, clip_ptr,
            lr, momentum, rest, weight_decay,
            MOMENTUM, FIRST, NESTEROV, MAXIMIZE, MASTER, True,
        )  # fmt: skip
    else:
        _sgd_block(
            p_like, g_like, m_like, row_ptr, cols, cols < n, grad_scale_ptr, clip_ptr,
            lr, momentum, rest, weight_decay,
            MOMENTUM, FIRST, NESTEROV, MAXIMIZE, MASTER, False,
        )  # fmt: skip


@triton.jit
def block_norms(g_like, table_ptr, tensor_ptr, out_ptr, BLOCK: tl.constexpr):
    """One program per block of a tensor leaves the norm of it."""
    row_ptr, start, n = _find_block(table_ptr, tensor_ptr, 3, BLOCK)
    cols = start + tl.arange(0, BLOCK)
    if _may_be_wide(row_ptr, start, n, 3, BLOCK):
        g = _read(_pointers(row_ptr, 2, g_like, cols, True), None)
    else:
        g = _read(_pointers(row_ptr, 2, g_like, cols, False), cols < n)
    tl.store(out_ptr + tl.program_id(0), tl.sqrt(tl.sum(g * g, axis=0)))

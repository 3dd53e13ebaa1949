"""Triton's interpreter, made to compute what a GPU computes. It runs kernels on CPU tensors, one at
a time.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# The interpreter keeps its state in globals.
_lock = threading.Lock()


def run(kernel: Callable[..., Any], *args: Any, **constants: Any) -> None:
    """Launch a kernel that is bound to its grid."""
    # a GPU does not warn of infinities either, least of all in lanes that a mask throws away
    with _lock, np.errstate(all="ignore"):
        _patch()
        kernel(*args, **constants)


@functools.cache
def _patch() -> None:
    """bfloat16, which numpy does not have: casts truncate, and tl.dot multiplies the bit patterns
    as integers.
    """
    builder, patch_tensor = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        types = (src.dtype.scalar, dst_type.scalar)
        if types == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round(src.data), tl.bfloat16)
        return _widen(src) if types == (tl.bfloat16, tl.float32) else cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *args)

    def patched_tensor(tensor: Any, *args: Any, **kwargs: Any) -> None:
        patch_tensor(tensor, *args, **kwargs)
        # A range with a tensor as bound: numpy >= 2.4 refuses what Triton 3.6 does for it.
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter._patch_lang_tensor = patched_tensor


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _round(values: Any) -> Any:
    """float32 to the bits of bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)

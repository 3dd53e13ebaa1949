"""torch's flash attention, for calls where a table says that it is faster: the same outputs and the
same saved statistics.
"""

from typing import Any

import torch
from torch import Tensor

from . import _tuned
from ._launch import device_of
from .attention_launch import LN2, Given, Gradients, asked, like, like_backward

TYPES = (torch.float16, torch.bfloat16)

_aten: Any = torch.ops.aten


def is_faster(part: str, a: Given) -> bool:
    """Whether torch has a kernel for a pass of this call, "forward" or "backward", and it was
    measured to be faster.
    """
    if not serves(a):
        return False
    tuned = _tuned.lookup(*asked(part, a), device_of(a.q))
    return tuned is not None and tuned.variant == "torch"


def serves(a: Given) -> bool:
    """Whether torch's kernel computes this: plain logits, all of them or those of a square that is
    causal, of heads that have keys of their own.
    """
    more = (a.mask, a.slopes, a.sinks, a.seed, a.cu_q, a.used_k, a.table)
    if a.q.dtype not in TYPES or a.softcap or a.scale <= 0 or any(x is not None for x in more):
        return False
    (_, H, Sq, D), (_, H_k, Sk, D_v) = a.q.shape, (*a.k.shape[:3], a.v.shape[3])
    shaped = H_k == H and D_v == D and D % 8 == 0 and D <= 256
    seen = (a.left, a.right) == (-1, -1) or (_is_causal(a) and Sq == Sk)
    return shaped and seen and _is_built(a.q)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _is_causal(a: Given) -> bool:
    return (a.left, a.right) == (-1, 0)


def _is_built(q: Tensor) -> bool:
    if not _on_gpu(q):
        return True
    return torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()


def forward(a: Given) -> tuple[Tensor, Tensor]:
    o, lse = like(*a)
    q, k, v = (_aligned(x) for x in a[:3])
    if _on_gpu(q):
        flash = _aten._scaled_dot_product_flash_attention
    else:
        flash = _aten._scaled_dot_product_flash_attention_for_cpu
    found, natural = flash(q, k, v, 0.0, _is_causal(a), scale=a.scale)[:2]
    torch.div(natural, LN2, out=lse)
    return _arranged(found, o), lse


def backward(do: Tensor, o: Tensor, lse: Tensor, a: Given, needs: list[bool]) -> Gradients:
    made = like_backward(do, None, o, lse, *a, needs)
    tensors = [_aligned(x) for x in (do, *a[:3], o)]
    if _on_gpu(do):
        seed = torch.empty((), dtype=torch.int64, device=do.device)  # of no dropout
        lengths = (None, None, a.q.shape[2], a.k.shape[2])
        found = _aten._scaled_dot_product_flash_attention_backward(
            *tensors, lse * LN2, *lengths, 0.0, _is_causal(a), seed, seed, scale=a.scale
        )
    else:
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse * LN2, 0.0, _is_causal(a), scale=a.scale
        )
    dq, dk, dv = (
        new if new is None else _arranged(value, new)
        for new, value in zip(made[:3], found, strict=True)
    )
    return dq, dk, dv, *made[3:]


def _aligned(x: Tensor) -> Tensor:
    """With columns side by side, and rows that 16 bytes can be read of at a time."""
    steps = [stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    even = x.stride(-1) == 1 and all(stride % 8 == 0 for stride in steps[:-1])
    fits = even and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _arranged(value: Tensor, like: Tensor) -> Tensor:
    return value if value.stride() == like.stride() else like.copy_(value)

"""torch's own attention call: fastdl's kernels in the place of its flash attention.

torch has a registry of flash attentions, which replace two of its ops on CUDA tensors. So, after
`register()`, `F.scaled_dot_product_attention` runs fastdl's kernels, with gradients, wherever torch
would choose flash attention: float16 and bfloat16 on a GPU, without a mask. All other calls, those
on a CPU among them, are torch's as before; `fastdl.optimize` and `fastdl.functional` take more.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import attention

from ..ops._rng import draw_seed
from ..ops._toolchain import register_a_is_safe
from ..ops.attention import BACKWARD, FORWARD
from ..ops.attention_launch import LN2

NAME = "fastdl"
_FORWARD, _BACKWARD = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
)


def register() -> None:
    """Add fastdl to torch's flash attentions and choose it."""
    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of flash attentions, newer ones do; call"
            " fastdl.functional.scaled_dot_product_attention or fastdl.optimize(model) instead"
        )
    if attention.current_flash_attention_impl() != NAME:
        attention.register_flash_attention_impl(NAME, register_fn=install)
        attention.activate_flash_attention_impl(NAME)


def unregister() -> None:
    """Give torch its own flash attention again, unless somebody else's was chosen meanwhile."""
    current = getattr(attention, "current_flash_attention_impl", lambda: None)()
    if current == NAME:
        attention.restore_flash_attention_impl()


class Installed:
    """Ops of torch that are replaced until `remove()`."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library = library

    def remove(self) -> None:
        self._library._destroy()


def install(device: str = "CUDA") -> Installed:
    """Replace torch's ops of flash attention for the tensors of a device."""
    library = torch.library.Library("aten", "IMPL")
    for name, made in ((_FORWARD, _forward_before), (_BACKWARD, _backward_before)):
        try:
            theirs = torch.library.get_kernel(f"aten::{name}", device)
        except RuntimeError:  # a torch without flash attention
            theirs = None
        library.impl(name, made(theirs), device, with_keyset=True)
    return Installed(library)


def _is_ours(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> bool:
    """Whether the kernels run forward. Backward asks the same, because dropout's state is of one
    or of the other.
    """
    seed = q if dropout_p > 0 else None  # what counts is that there is one
    return (
        FORWARD._reason(*_arguments(q, k, v, seed, dropout_p, is_causal, scale)) is None
        and register_a_is_safe(q.device)
        # flash attention's causal mask begins at the last key
        and not (is_causal and k.shape[2] < q.shape[2])
    )


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None,
) -> tuple[Any, ...]:  # fmt: skip
    right = k.shape[2] - q.shape[2] if is_causal else -1
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    nothing = (None,) * 4  # packed sequences
    return q, k, v, None, None, None, seed, *nothing, 0, 0, -1, right, scale, 0.0, dropout_p, 0


def _forward_before(theirs: Any) -> Any:
    """torch's forward op: ours where it can, else what torch had there."""

    def forward(
        keys: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        ours = not return_debug_mask and _is_ours(q, k, v, dropout_p, is_causal, scale)
        if theirs is not None and not ours:
            return theirs.call_boxed(
                keys, q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale
            )
        # where torch has the state of its generator, the seed
        state = torch.zeros(2, dtype=torch.int64, device=q.device)
        seed = state[0].copy_(draw_seed(q.device)) if dropout_p > 0 else None
        o, lse = FORWARD.overload(*_arguments(q, k, v, seed, dropout_p, is_causal, scale))
        unused, state = state.new_empty(()).view(torch.uint64), state.view(torch.uint64)
        lengths, debug = (None, None, q.shape[2], k.shape[2]), q.new_empty(0)
        return o, lse * LN2, *lengths, state, unused, debug

    return forward


def _backward_before(theirs: Any) -> Any:
    """torch's backward op, likewise."""

    def backward(
        keys: Any, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_q: Any,
        cu_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool, state: Tensor,
        unused: Tensor, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        seed = state.view(torch.int64)[0] if dropout_p > 0 else None
        given = _arguments(q, k, v, seed, dropout_p, is_causal, scale)
        needs = [True, True, True, False, False]
        ours = _is_ours(q, k, v, dropout_p, is_causal, scale)
        # or torch's kernel was measured to be faster at this pass
        if theirs is not None and (not ours or BACKWARD._reason(do, None, o, lse, *given, needs)):
            return theirs.call_boxed(
                keys, do, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, state,
                unused, scale=scale,
            )  # fmt: skip
        found = BACKWARD.overload(do, None, o, lse / LN2, *given, needs)
        return found[:3]

    return backward

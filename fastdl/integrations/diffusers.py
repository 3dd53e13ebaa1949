"""Hugging Face diffusers: attention in the modules of a model.

A diffusers module hands its tensors to a processor, and that to torch's attention or to diffusers'
`dispatch_attention_fn`. `use(model)`, and `fastdl.optimize` likewise, gives each processor a class
with the same code, in which these two are fastdl's. Its state stays, and another processor or
backend, set later, works as without fastdl.
"""

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF
from ..optimize import libraries
from ..optimize.libraries import Taken
from ..optimize.rules import swap

_OP = "scaled_dot_product_attention"
_DISPATCH = "dispatch_attention_fn"


def register() -> None:
    """Make diffusers' attention known to `fastdl.optimize`, as importing this module does."""
    libraries.EXAMINERS["diffusers"] = examine
    libraries.PARTS.add("processor")


def unregister() -> None:
    """Let `fastdl.optimize` leave diffusers' attention alone. Models keep what they have."""
    libraries.EXAMINERS["diffusers"] = lambda module, cls: None


def use(model: nn.Module) -> nn.Module:
    """Put fastdl's attention into a model, in place; `fastdl.restore(model)` takes it out."""
    for module in model.modules():
        taken = examine(module, type(module))
        if taken is not None and taken.target is not None:
            swap(module, taken.target)
    return model


def examine(module: nn.Module, cls: type) -> Taken | None:
    """What `optimize` may do with a module: attention is what has a processor and calls it."""
    if not any(base.__module__.startswith("diffusers.") for base in cls.__mro__):
        return None
    processor, forward = getattr(module, "processor", None), getattr(cls, "forward", None)
    if processor is None or not isinstance(forward, types.FunctionType):
        return None
    if "processor" not in forward.__code__.co_names:
        return None
    kind = libraries.MADE.get(type(processor), type(processor))
    reason = _refusal(module, kind)
    return Taken(_OP, None if reason else fused_class(kind), reason)


def _refusal(module: nn.Module, kind: type) -> str | None:
    """Why a module's processor keeps its class."""
    if issubclass(kind, nn.Module):
        return f"its {kind.__name__} has parameters"
    if _is_basic(kind):
        return _unfit_for_basic(module)
    code = _code(kind)
    if code is None or not _replacements(code):
        return f"its {kind.__name__} does not call torch's attention"
    return None


def _is_basic(kind: type) -> bool:
    return kind.__module__ == "diffusers.models.attention_processor" and (
        kind.__name__ == "AttnProcessor"
    )


def _unfit_for_basic(module: Any) -> str | None:
    """Whether AttnProcessor2_0, which takes torch's scale, computes what AttnProcessor does."""
    width = module.inner_dim // module.heads
    if abs(module.scale * width**0.5 - 1) > 1e-6:
        return f"its scale is {module.scale:.3g} and not 1 / sqrt({width})"
    if module.norm_q is not None or module.norm_k is not None:
        return "its AttnProcessor leaves out the norms of queries and keys"
    return None


@functools.cache
def fused_class(kind: type) -> type:
    """A class of processors that finds fastdl's functions."""
    source = kind
    if _is_basic(kind):
        source = importlib.import_module(kind.__module__).AttnProcessor2_0
    code = _code(source)
    assert code is not None
    members = {"__call__": libraries.rebound(code, _replacements(code))}
    return libraries.derive(kind, fused_class, members)


def _code(kind: type) -> types.FunctionType | None:
    call = getattr(kind, "__call__", None)  # noqa: B004 - the function itself is wanted
    return call if isinstance(call, types.FunctionType) else None


def _replacements(code: types.FunctionType) -> dict[str, Any]:
    """What the names of attention in this code shall mean."""
    names, scope = code.__code__.co_names, code.__globals__
    found: dict[str, Any] = {}
    if _OP in names and "F" in names and scope.get("F") is F:
        found["F"] = types.SimpleNamespace(**{**vars(F), _OP: FF.scaled_dot_product_attention})
    if _DISPATCH in names and _DISPATCH in scope:
        found[_DISPATCH] = functools.partial(dispatch, scope[_DISPATCH])
    return found


def dispatch(
    original: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """diffusers' attention function, [batch, position, head, column]. One for several devices, and
    a backend other than torch's own, is diffusers' matter.
    """
    if attention_kwargs or parallel_config is not None or not _is_native(backend):
        return original(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
            backend=backend, parallel_config=parallel_config,
        )  # fmt: skip
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # of keys
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = FF.scaled_dot_product_attention(
        q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2)


def _is_native(backend: Any) -> bool:
    """Whether torch's own attention is asked for: by name, or by the choice in force."""
    if backend is None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend = _AttentionBackendRegistry._active_backend
    return getattr(backend, "value", backend) == "native"


register()

"""Hugging Face transformers: attention by name, and in the modules of a model that exists.

After `register()`, `model.set_attn_implementation("fastdl")` chooses fastdl's attention, and causal
masks without padding are never made. `fastdl.optimize` needs no registration: an attention module
takes a class whose `forward` finds fastdl's functions for "sdpa" and "eager". The config stays as
it is, so what is saved does not name fastdl, and another implementation, chosen later, is honoured.
"""

import dis
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as FF
from ..ops._route import policy
from ..optimize.libraries import EXAMINERS, Taken, derive, rebound

NAME = "fastdl"
_OP = "scaled_dot_product_attention"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"

# What would change the result, and is not in the mask: the reason.
_REFUSED = {
    "cache": "it reads a paged cache",
    "indices": "each query has its own list of keys",
    "block_indices": "each query has its own list of blocks of keys",
    "sinks": "its sinks differ by position",
    "head_mask": "it weights heads",
    "layer_head_mask": "it weights heads",
}


def register() -> None:
    """Make `set_attn_implementation("fastdl")` work, for every model."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def unregister() -> None:
    """Forget the name. Models that still use it raise transformers' error when they are called."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query is [batch, head, position, column], the output has
    heads after positions. The weights are None unless they are asked for.
    """
    _refuse(module, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # one query is the last one: it sees every key
    causal = causal and attention_mask is None and query.shape[2] > 1
    if attention_mask is not None:
        sliding_window = None  # the mask has it
    attend = functools.partial(
        FF.scaled_dot_product_attention,
        query,
        key,
        attn_mask=_with_bias(attention_mask, position_bias),
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        window_size=_window(module, query, key, sliding_window, causal),
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    out = attend(value, dropout_p=dropout).transpose(1, 2).contiguous()
    if not wants_weights(kwargs):
        return out, None
    # attention to the rows of an identity: the weights themselves, before dropout
    one = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
    return out, attend(one.expand(*key.shape[:2], -1, -1))


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"fastdl attention: {type(module).__name__} passes {name}: {why}, which fastdl"
                ' cannot do here; use model.set_attn_implementation("sdpa") or "eager"'
            )


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One mask of both. Like transformers' own, it hides with the least number, not with -inf."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype != torch.bool:
        return bias + mask
    return torch.where(mask, bias, torch.finfo(bias.dtype).min)


def _window(
    module: nn.Module, query: Tensor, key: Tensor, size: int | None, causal: bool
) -> tuple[int, int]:
    """The window where no mask holds it. With a cache, queries are not at the first positions."""
    if size is None or size >= key.shape[2]:
        return (-1, -1)
    if causal and query.shape[2] == key.shape[2]:
        return (size - 1, 0)
    raise ValueError(
        f"fastdl attention: {type(module).__name__} asks for a window of {size} on"
        f" {query.shape[2]} queries and {key.shape[2]} keys without a mask; pass the mask, as"
        " models do after fastdl.integrations.transformers.register()"
    )


def wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asks for attention weights: with an argument, or by collecting outputs."""
    if kwargs.get("output_attentions"):
        return True
    from transformers.utils.output_capturing import _active_collector as collector

    if torch.compiler.is_compiling() and not collector.compiling:
        return False  # nobody above collects, and a context variable cannot be traced
    return any(key.endswith("attentions") for key in collector.get() or ())


# transformers' functions that ours stand in for -> the arguments that these honour.
_HONOURED: dict[Callable[..., Any], frozenset[str]] = {}

_BASIC = ["module", "query", "key", "value", "attention_mask"]
_OPTIONS = frozenset({"scaling", "dropout", "softcap", "position_bias"})


def stand_in(
    original: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a function of transformers computes. It is called itself where it gives more."""
    honoured = _HONOURED[original]
    refused = kwargs.get("softcap") is not None and "is_causal" in honoured  # sdpa raises
    if refused or wants_weights(kwargs) or kwargs.get("cache") is not None:
        return original(module, query, key, value, attention_mask, **kwargs)
    options = {name: kwargs[name] for name in honoured if name in kwargs}
    if "is_causal" not in honoured:  # eager: the mask says everything
        options |= {"is_causal": False, "s_aux": getattr(module, "sinks", None)}
        options["dropout"] = kwargs.get("dropout", 0.0) if module.training else 0.0
    return attention(module, query, key, value, attention_mask, **options)


class _Interface:
    """transformers' table of attention functions, with ours in the place of those they match."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def get_interface(self, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return self._ours(self._table.get_interface(implementation, default))

    def __getitem__(self, implementation: str) -> Callable[..., Any]:
        return self._ours(self._table[implementation])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def _ours(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(stand_in, function) if function in _HONOURED else function


@functools.cache
def fused_class(cls: type) -> type:
    """A class of attention modules that finds fastdl's functions."""
    forward: Any = cls.forward  # type: ignore[attr-defined]
    table = _Interface(forward.__globals__[_INTERFACE])
    members = {"forward": rebound(forward, {_INTERFACE: table}), "gives_less": True}
    return derive(cls, fused_class, members)


def examine(module: nn.Module, cls: type) -> Taken | None:
    """What `optimize` may do with a module: attention is what asks transformers' table for it."""
    forward = getattr(cls, "forward", None)
    if not isinstance(forward, types.FunctionType) or _INTERFACE not in forward.__code__.co_names:
        return None
    reason = _refusal(module, forward)
    return Taken(_OP, None if reason else fused_class(cls), reason)


def _refusal(module: nn.Module, forward: types.FunctionType) -> str | None:
    """Why an attention module keeps its class."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as other libraries do"
    table: Any = forward.__globals__.get(_INTERFACE)
    config: Any = getattr(module, "config", None)
    if table is None or not hasattr(config, "_attn_implementation"):
        return "it does not name its attention as other models of transformers do"
    chosen = config._attn_implementation or "eager"
    if chosen == NAME:
        return "its attention is fastdl's by name"
    if chosen not in ("sdpa", "eager"):
        return f'its attention was chosen: "{chosen}"'
    if chosen == "sdpa":
        return _unfit_sdpa(table["sdpa"])
    functions = [
        function
        for name in forward.__code__.co_names
        if "eager" in name and callable(function := forward.__globals__.get(name))
    ]
    if not functions:
        return "its eager attention is not a function"
    return next(filter(None, (_unfit_eager(function, module) for function in functions)), None)


def _unfit_sdpa(function: Callable[..., Any]) -> str | None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if function is not sdpa_attention_forward:
        return 'its model has an "sdpa" of its own'
    _HONOURED[function] = frozenset({"dropout", "scaling", "is_causal", "position_bias"})
    return None


def _unfit_eager(function: Any, module: nn.Module) -> str | None:
    """Whether ours can stand in for an eager function: by its arguments, and by trying."""
    if function in _HONOURED:
        return None
    parameters = inspect.signature(function).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    rest = next((name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD), "")
    more = set(names[len(_BASIC) :]) - _OPTIONS
    if any(step.argval == rest for step in dis.get_instructions(function) if rest):
        more.add(rest)
    if more:
        return f"its eager attention takes {', '.join(sorted(more))}"
    _HONOURED[function] = frozenset(names[len(_BASIC) :])
    if not _agree(function, module):
        del _HONOURED[function]
        return "its eager attention is not what fastdl's computes"
    return None


def _agree(function: Any, module: nn.Module) -> bool:
    """Run both on a few numbers."""
    sinks = getattr(module, "sinks", None)
    if sinks is not None and sinks.device.type == "meta":
        return False
    device = torch.device("cpu") if sinks is None else sinks.device
    groups = getattr(module, "num_key_value_groups", 1)
    heads = 2 * groups if sinks is None else len(sinks)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    q, k, v = draw(2, heads, 3, 4), draw(2, heads // groups, 5, 4), draw(2, heads // groups, 5, 4)
    mask = draw(2, 1, 3, 5).where(draw(2, 1, 3, 5) > 0, torch.finfo(torch.float32).min)
    options: dict[str, Any] = {"scaling": 0.3, "dropout": 0.0}
    options |= {"softcap": 2.0, "position_bias": draw(1, heads, 3, 5), "s_aux": sinks}
    try:
        with torch.no_grad(), policy("definition"):
            theirs = function(module, q, k, v, mask, **options)[0]
            ours = stand_in(function, module, q, k, v, mask, **options)[0]
    except Exception:  # whatever it needs beyond this, fastdl does not know
        return False
    return theirs.shape == ours.shape and bool(torch.allclose(theirs, ours, 1e-4, 1e-4))


EXAMINERS["transformers"] = examine

"""Other kernel libraries where they are installed: for calls whose options they cover exactly."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdl.functional as FF
from bench.attention import when_called

Form = Callable[..., Any]


class Cover(NamedTuple):
    """What a library has for an op.

    `form(library, ...)` has those parameters of the op that the library knows, `fits` says of
    their values whether they are among those that it takes.
    """

    library: str
    module: str
    form: Form
    fits: Callable[[Any], bool]


COVERS: dict[Any, list[Cover]] = {}

# The name of a contender, and the package it comes from.
LIBRARIES = {"liger": "liger_kernel", "flash-attn": "flash_attn", "quack": "quack"}


def covers(op: Any, library: str, module: str, fits: Any = lambda a: True) -> Any:
    def mark(form: Form) -> Form:
        COVERS.setdefault(op, []).append(Cover(library, module, form, fits))
        return form

    return mark


def contenders(call: "partial[Any]") -> dict[str, Form]:
    """By library. Nothing is imported before the first call."""
    found: dict[str, Form] = {}
    for cover in COVERS.get(call.func, ()):
        given = arguments(cover.form, call)
        if given is None or not cover.fits(given) or not installed(cover.library):
            continue
        found[cover.library] = when_called(partial(_imported, cover))
    return found


def installed(library: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[library]) is not None


def _imported(cover: Cover) -> Form:
    return partial(cover.form, importlib.import_module(cover.module))


def arguments(form: Form, call: "partial[Any]") -> SimpleNamespace | None:
    """The arguments of a call by name, or None where the form has not all of these parameters."""
    try:
        bound = inspect.signature(form).bind(None, *call.args, **call.keywords)
    except TypeError:
        return None
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def _frozen(*tensors: Tensor | None) -> bool:
    """Nobody asks for the gradients of these."""
    return not any(t is not None and t.requires_grad for t in tensors)


def _one_dimension(a: Any) -> bool:
    return len(a.normalized_shape) == 1 and a.weight is not None


# fastdl's names of where a norm rounds, and Liger's
CASTS = {"torch": "gemma", "gemma": "gemma", "llama": "llama"}
LIGER = "liger_kernel.transformers.functional"


@covers(FF.layer_norm, "liger", LIGER, lambda a: _one_dimension(a) and a.bias is not None)
def liger_layer_norm(
    liger: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return liger.liger_layer_norm(input, weight, bias, eps)


@covers(FF.rms_norm, "liger", LIGER, lambda a: _one_dimension(a) and a.eps is not None)
def liger_rms_norm(
    liger: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None, *,
    weight_offset: float = 0.0, cast: str = "torch",
) -> Tensor:  # fmt: skip
    return liger.liger_rms_norm(input, weight, eps, weight_offset, CASTS[cast], in_place=False)


@covers(
    FF.rms_norm, "liger", LIGER, lambda a: _one_dimension(a) and a.eps is not None and a.prenorm
)
def liger_add_rms_norm(
    liger: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None, *,
    residual: Tensor, prenorm: bool = False, weight_offset: float = 0.0, cast: str = "torch",
) -> Any:  # fmt: skip
    return liger.liger_fused_add_rms_norm(
        input, residual, weight, eps, weight_offset, CASTS[cast], in_place=False
    )


def _liger_glu(activation: str, name: str) -> None:
    @covers(FF.glu, "liger", LIGER, lambda a: a.activation == activation)
    def form(liger: Any, input: Tensor, *, activation: Any, gate: Tensor) -> Tensor:
        return getattr(liger, name)(gate, input)


_liger_glu("silu", "liger_swiglu")
_liger_glu("gelu_tanh", "liger_geglu")


@covers(
    FF.apply_rotary_emb, "liger", LIGER,
    lambda a: not a.interleaved and a.x.dim() == 4 and a.cos.dim() == 2 and _frozen(a.cos, a.sin),
)  # fmt: skip
def liger_rope(
    liger: Any, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Liger turns queries and keys in one go: here the keys are those of a single head."""
    B, _, S, D = x.shape
    return liger.liger_rope(x, x.new_empty(B, S, 1, D).transpose(1, 2), cos, sin)[0]


def _labels(a: Any) -> bool:
    return a.input.dim() == 2 and a.target.dim() == 1 and _frozen(a.weight)


@covers(FF.cross_entropy, "liger", LIGER, _labels)
def liger_cross_entropy(
    liger: Any, input: Tensor, target: Tensor, weight: Any = None, *, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    return liger.liger_cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, lse_square_scale=z_loss, softcap=softcap or None,
    )  # fmt: skip


@covers(
    FF.linear_cross_entropy, "liger", LIGER, lambda a: _labels(a) and a.reduction in ("mean", "sum")
)
def liger_linear_cross_entropy(
    liger: Any, input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Any = None,
    weight: Any = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    return liger.liger_fused_linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, ignore_index=ignore_index,
        lse_square_scale=z_loss, label_smoothing=label_smoothing, reduction=reduction,
        softcap=softcap or None,
    )  # fmt: skip


def _last(a: Any) -> bool:
    return a.input.dim() > 1 and a.dim in (-1, a.input.dim() - 1)


@covers(FF.softmax, "liger", LIGER, _last)
def liger_softmax(liger: Any, input: Tensor, dim: int | None = None) -> Tensor:
    return liger.liger_softmax(input)


@covers(
    FF.group_norm, "liger", LIGER, lambda a: a.weight is not None and a.bias is not None
)  # fmt: skip
def liger_group_norm(
    liger: Any, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return liger.liger_group_norm(input, weight, bias, input.shape[1], num_groups, eps)


@covers(FF.kl_div, "liger", LIGER, lambda a: a.input.dim() == 2 and _frozen(a.target))
def liger_kl_div(
    liger: Any, input: Tensor, target: Tensor, *, reduction: str = "mean", log_target: bool = False
) -> Tensor:
    return liger.liger_kl_div(input, target, reduction=reduction, log_target=log_target)


def _flash(a: Any) -> bool:
    """Its masks end together where torch's begin together. ALiBi's slopes get no gradient."""
    options = vars(a)
    slopes = options.get("alibi_slopes")
    limited = options.get("is_causal") or tuple(a.window_size) != (-1, -1) or slopes is not None
    return (
        a.query.dtype in (torch.float16, torch.bfloat16)
        and a.query.shape[-1] == a.value.shape[-1] <= 256
        and (a.query.dim() == 3 or not limited or a.query.shape[-2] == a.key.shape[-2])
        and (slopes is None or (slopes.dtype == torch.float32 and _frozen(slopes)))
    )


def _swapped(*tensors: Tensor) -> Any:
    """[batch, head, token, column] as [batch, token, head, column], or back."""
    return tuple(t.transpose(1, 2) for t in tensors)


@covers(
    FF.scaled_dot_product_attention, "flash-attn", "flash_attn",
    lambda a: a.query.dim() == 4 and _flash(a),
)  # fmt: skip
def flash_attention(
    flash: Any, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, window_size: Any = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Any = None,
) -> Tensor:  # fmt: skip
    # its call for a cache splits the keys over the multiprocessors
    decoding = query.shape[-2] == 1 and _frozen(query, key, value)
    call = flash.flash_attn_with_kvcache if decoding else flash.flash_attn_func
    o = call(
        *_swapped(query, key, value), softmax_scale=scale, causal=is_causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return o.transpose(1, 2)


@covers(FF.varlen_attn, "flash-attn", "flash_attn", _flash)
def flash_varlen(
    flash: Any, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: Any = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    return flash.flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale,
        window_size=window_size,
    )  # fmt: skip


def _wide(a: Any) -> bool:
    return a.cast != "llama" and _one_dimension(a) and a.eps is not None


@covers(FF.rms_norm, "quack", "quack", _wide)
def quack_rms_norm(
    quack: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None, *,
    weight_offset: float = 0.0, cast: str = "torch",
) -> Tensor:  # fmt: skip
    return quack.rmsnorm(input, weight, eps=eps, weight_offset=weight_offset)


@covers(FF.rms_norm, "quack", "quack", _wide)
def quack_add_rms_norm(
    quack: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None, *,
    residual: Tensor, prenorm: bool = False, weight_offset: float = 0.0, cast: str = "torch",
) -> Any:  # fmt: skip
    return quack.rmsnorm(
        input, weight, residual=residual, eps=eps, prenorm=prenorm, weight_offset=weight_offset
    )


@covers(
    FF.layer_norm, "quack", "quack.rmsnorm",
    lambda a: (
        _one_dimension(a) and a.input.dim() == 2 and _frozen(a.input, a.weight, a.bias)
        and all(t is None or t.dtype == torch.float32 for t in (a.weight, a.bias))
    ),
)  # fmt: skip
def quack_layer_norm(
    quack: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return quack.layernorm_fwd(input, weight, bias, eps)


@covers(FF.softmax, "quack", "quack", lambda a: a.input.dim() == 2 and _last(a))
def quack_softmax(quack: Any, input: Tensor, dim: int | None = None) -> Tensor:
    return quack.softmax(input)


@covers(FF.cross_entropy, "quack", "quack", _labels)
def quack_cross_entropy(
    quack: Any, input: Tensor, target: Tensor, weight: Any = None, *, ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    return quack.cross_entropy(
        input, target, weight=weight, ignore_index=ignore_index, reduction=reduction
    )

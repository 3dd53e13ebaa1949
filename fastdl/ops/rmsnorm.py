"""RMS normalization with the residual before it, in the cast orders of Llama and Gemma."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _tuned
from ._launch import device_of
from ._op import (
    SPELLINGS,
    Gradient,
    LibraryOp,
    Op,
    Spelling,
    autocast_to_float32,
    differentiating,
    empty_gradients,
    form_of,
    gradients,
    second_derivative,
)
from ._route import Reason
from ._rows import as_rows, check, choose, launch_backward, launch_forward
from ._strides import joins

# Whether the normalized rows are rounded before they meet the weight.
_ROUNDS = {"torch": False, "llama": True, "gemma": False}


def definition(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float,
    offset: float, rounds: bool,
) -> Any:  # fmt: skip
    """h / rms(h) (weight + offset) of h = x + residual, over the last `dims` dimensions; with a
    residual, h too.
    """
    h = x if residual is None else x + residual
    shape = h.shape[h.dim() - dims :]
    wide = h.dtype if weight is None else torch.promote_types(h.dtype, weight.dtype)
    if weight is None or not (offset or rounds):
        weight = None if weight is None else weight.to(wide)
        y = F.rms_norm(h.to(wide), shape, weight, eps).to(h.dtype)
    else:
        wide = torch.promote_types(wide, torch.float32)
        y = F.rms_norm(h.to(wide), shape, None, eps)
        y = y.to(h.dtype).to(wide) if rounds else y
        y = (y * (weight.to(wide) + offset)).to(h.dtype)
    return y if residual is None else (y, h)


def _like(
    x: Tensor, residual: Tensor | None, weight: Any, dims: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, h, x.new_empty(x.shape[: x.dim() - dims], dtype=torch.float32)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float,
    offset: float, rounds: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, rstd = _like(x, residual, weight, dims, eps, offset, rounds)
    rows = as_rows(x, dims)
    launch_forward(
        rows, residual, weight, None, None, None, y, None if residual is None else h, None, rstd,
        1, eps, choose("rms_norm", rows.shape[1], x.dtype, device_of(x)), offset, rounds,
    )  # fmt: skip
    return y, h, rstd


def _torch_forward(
    x: Tensor, residual: Tensor | None, weight: Any, dims: int, eps: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = _like(x, residual, weight, dims, eps, *rest)
    found = definition(x, residual, weight, dims, eps, *rest)
    y_, h_ = (found, x) if residual is None else found
    if residual is not None:
        h.copy_(h_)
    if x.numel():
        rstd.copy_(h_.float().flatten(x.dim() - dims).square().mean(-1).add(eps).rsqrt())
    return y.copy_(y_), h, rstd


def _decline(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, *args: Any
) -> Reason | None:
    n_cols = x.shape[x.dim() - dims :].numel()
    tuned = _tuned.lookup("rms_norm", x.dtype, (n_cols,), device_of(x))
    return Reason.MEASURED if tuned is not None and tuned.variant == "torch" else None


Gradients = tuple[Gradient, Gradient]


def _like_backward(dy: Tensor, dh: Any, h: Tensor, weight: Any, *rest: Any) -> Gradients:
    return empty_gradients((h, weight), rest[-1])


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, dims: int,
    eps: float, offset: float, rounds: bool, needs: list[bool],
) -> Gradients:  # fmt: skip
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if needs[0] else None
    rows = as_rows(h, dims)
    sums = launch_backward(
        dy, dh, rows, weight, None, None, None, rstd, dx, 1,
        choose("rms_norm_backward", rows.shape[1], h.dtype, device_of(h)), needs[1], offset,
    )  # fmt: skip
    if sums is None or weight is None:
        return dx, None
    return dx, sums.view(weight.shape).to(weight.dtype)


def _torch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Any, rstd: Tensor, *rest: Any
) -> Gradients:
    *options, needs = rest
    args = (h, None, weight, *options)
    dx, _, dweight = gradients(definition, args, dy, [needs[0], False, needs[1]])[:3]
    return (dx if dx is None or dh is None else dx + dh), dweight


FORWARD = LibraryOp("rms_norm", _forward, like=_like, torch_form=_torch_forward, decline=_decline)
BACKWARD = LibraryOp(
    "rms_norm_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, *options: Any
    ) -> Any:
        y, h, rstd = FORWARD.overload(x, residual, weight, *options)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        into_x, into_residual, into_weight = ctx.needs_input_grad[:3]
        if dy is None:
            return dh, dh, None, None, None, None, None
        h, weight, rstd = ctx.saved_tensors
        needs = [into_x or into_residual, into_weight]
        if differentiating():
            # h is an output of this Function: its own path back to x and residual is added by
            # autograd
            args, wanted = (h, None, weight, *ctx.options), [needs[0], False, needs[1]]
            dx, _, dweight = second_derivative("rms_norm", definition, args, dy, wanted)[:3]
            dx = dx if dh is None or dx is None else dx + dh
        else:
            dx, dweight = BACKWARD.overload(dy, dh, h, weight, rstd, *ctx.options, needs)
        dx_of = [dx if into else None for into in (into_x, into_residual)]
        return *dx_of, dweight, None, None, None, None


def _inference(x: Tensor, residual: Tensor | None, *args: Any) -> Any:
    y, h, _ = FORWARD.overload(x, residual, *args)
    return y if residual is None else (y, h)


OP = Op("rms_norm", definition, RMSNormFunction, _inference)


def rms_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
    cast: str = "torch",
) -> Any:
    """h / sqrt(mean(h²) + eps) * (weight + weight_offset) of h = input + residual; with `prenorm`
    also h.

    All of it is float32, rounded once ("torch", and "gemma", whose weight_offset is 1); with
    `cast="llama"` it is rounded to the input's dtype before it meets the weight, too.
    """
    check("rms_norm", input, tuple(normalized_shape), weight=weight)
    if cast not in _ROUNDS:
        raise ValueError(f"rms_norm: cast is {cast!r}, allowed are {', '.join(_ROUNDS)}")
    input, weight, residual = autocast_to_float32(input, weight, residual)
    if residual is not None and not joins(residual, input):
        input, residual = input + residual, None
    if eps is None:
        # torch's, which computes in float32 where the input is less
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    options = (len(normalized_shape), eps, float(weight_offset), _ROUNDS[cast])
    out = OP(input, residual, weight, *options)
    y, h = (out, input) if residual is None else out
    return (y, h) if prenorm else y


@form_of("rms_norm")
def rms_norm_of_last(
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
    cast: str = "torch",
) -> Any:
    """rms_norm over the last dimension, as it is when people write it out."""
    return rms_norm(
        input, input.shape[-1:], weight, eps,
        residual=residual, prenorm=prenorm, weight_offset=weight_offset, cast=cast,
    )  # fmt: skip


Step = Callable[..., Any]


def _wide(x: Any) -> Any:
    return x.to(torch.float32)


def _mean(square: Any) -> Any:
    return square.mean(-1, keepdim=True)


# How rows are normalized: n of u, whose squares are taken of s, the same or in float32.
_NORMS: list[Step] = [
    lambda u, s, eps: u * torch.rsqrt(_mean(s().pow(2)) + eps),
    lambda u, s, eps: u * torch.rsqrt(_mean(s() * s()) + eps),
    lambda u, s, eps: u / torch.sqrt(_mean(s().pow(2)) + eps),
]

# What reads h, for the product and for the squares. Casts to the dtype at hand are not in a graph.
_PLAIN: tuple[Step, Step] = (lambda h: h, lambda h: h)
_IN_FLOAT32: tuple[Step, Step] = (_wide, _wide)
_SQUARES_IN_FLOAT32: tuple[Step, Step] = (lambda h: h, _wide)

# How n meets the weight, and the options that say so. A call passes c as the offset if it has one.
_ENDS: list[tuple[Step, tuple[tuple[Step, Step], ...], str]] = [
    (lambda n, w, c, dtype: n, (_PLAIN,), "torch"),
    (lambda n, w, c, dtype: n * w, (_PLAIN,), "torch"),
    (lambda n, w, c, dtype: n * (w + c), (_PLAIN,), "gemma"),
    (lambda n, w, c, dtype: n.to(dtype), (_IN_FLOAT32, _SQUARES_IN_FLOAT32), "torch"),
    (lambda n, w, c, dtype: n.to(dtype) * w, (_IN_FLOAT32, _SQUARES_IN_FLOAT32), "llama"),
    (lambda n, w, c, dtype: (n * w).to(dtype), (_IN_FLOAT32,), "torch"),
    (lambda n, w, c, dtype: (n * _wide(w)).to(dtype), (_IN_FLOAT32,), "torch"),
    (lambda n, w, c, dtype: (n * (w + c)).to(dtype), (_IN_FLOAT32,), "gemma"),
    (lambda n, w, c, dtype: (n * (_wide(w) + c)).to(dtype), (_IN_FLOAT32,), "gemma"),
]

# Whether there is a residual, and whether its sum is read further down.
_RESIDUALS = ((False, False), (True, False), (True, True))


def _given(**options: Any) -> dict[str, Any]:
    return {name: x for name, x in options.items() if x is not None}


def _spell(norm: Step, reads: tuple[Step, Step], end: Step, cast: str, sums: Any) -> Spelling:
    """The norm written out, over the last dimension."""
    adds, prenorm = sums

    def pattern(x: Any, r: Any, w: Any, eps: Any, c: Any) -> Any:
        h = x + r if adds else x
        product, squares = reads
        y = end(norm(product(h), lambda: squares(h), eps), w, c, h.dtype)
        return (y, h) if prenorm else y

    def call(x: Any, r: Any, w: Any, eps: Any, c: Any) -> partial[Any]:
        options = _given(residual=r, prenorm=prenorm or None, weight_offset=c)
        return partial(rms_norm_of_last, x, w, eps, cast=cast, **options)

    return Spelling(pattern, call)


def _spell_call(widens: bool, sums: Any) -> Spelling:
    """torch's function; `widens` is a norm in float32 of less."""
    adds, prenorm = sums

    def pattern(x: Any, r: Any, shape: Any, w: Any, eps: Any) -> Any:
        h = x + r if adds else x
        y = F.rms_norm(_wide(h) if widens else h, shape, w, eps)
        y = y.to(h.dtype) if widens else y
        return (y, h) if prenorm else y

    def call(x: Any, r: Any, shape: Any, w: Any, eps: Any) -> partial[Any]:
        return partial(rms_norm, x, shape, w, eps, **_given(residual=r, prenorm=prenorm or None))

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(norm, reads, end, cast, sums)
    for sums, norm, (end, readings, cast) in itertools.product(_RESIDUALS, _NORMS, _ENDS)
    for reads in readings
)
SPELLINGS.extend(
    _spell_call(widens, sums) for widens, sums in itertools.product((False, True), _RESIDUALS)
)

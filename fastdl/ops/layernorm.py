"""Layer normalization with the residual before it and the modulation after it."""

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
    gradients,
    second_derivative,
)
from ._route import Reason
from ._rows import as_rows, check, choose, launch_backward, launch_forward
from ._strides import joins


def definition(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
) -> Any:  # fmt: skip
    """norm(h) (1 + scale) + shift of h = x + residual, over the last `dims` dimensions; with a
    residual, h too.
    """
    h = x if residual is None else x + residual
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch cannot differentiate a bias alone twice
    wide = h.dtype if weight is None else torch.promote_types(h.dtype, weight.dtype)
    y = F.layer_norm(h.to(wide), h.shape[h.dim() - dims :], weight, bias, eps).to(h.dtype)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return y if residual is None else (y, h)


def _like(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean = x.new_empty(x.shape[: x.dim() - dims], dtype=torch.float32)
    return y, h, mean, torch.empty_like(mean)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, mean, rstd = _like(x, residual, weight, bias, scale, shift, dims, eps)
    groups, scale, shift = _by_group(x, scale, shift, dims)
    rows = as_rows(x, dims)
    launch_forward(
        rows, residual, weight, bias, scale, shift, y, None if residual is None else h, mean, rstd,
        groups, eps, choose("layer_norm", rows.shape[1], x.dtype, device_of(x)),
    )  # fmt: skip
    return y, h, mean, rstd


def _leading(x: Tensor, dims: int, *factors: Tensor | None) -> int:
    """How many leading dimensions of x scale and shift vary over."""
    n = x.dim() - dims
    shapes = [(1,) * (x.dim() - f.dim()) + tuple(f.shape) for f in factors if f is not None]
    return max((i + 1 for shape in shapes for i in range(n) if shape[i] != 1), default=0)


def _by_group(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, dims: int
) -> tuple[int, Tensor | None, Tensor | None]:
    """The number of groups of rows that share a scale and shift, and these as [groups, columns]."""
    if scale is None and shift is None:
        return 1, None, None
    lead = _leading(x, dims, scale, shift)
    groups, n = x.shape[:lead].numel(), x.dim() - dims
    shape = (*x.shape[:lead], *(1 for _ in range(n - lead)), *x.shape[n:])

    def expand(f: Tensor | None) -> Tensor | None:
        return None if f is None else f.expand(shape).reshape(groups, -1).contiguous()

    return groups, expand(scale), expand(shift)


def _torch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if residual is scale is shift is None and x.numel():
        wide = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
        shape, rows = x.shape[x.dim() - dims :], x.shape[: x.dim() - dims]
        y, mean, rstd = torch.native_layer_norm(x.to(wide), shape, weight, bias, eps)
        if mean.dtype == torch.float32:  # a CPU rounds those of 16 bits
            mean, rstd = mean.reshape(rows), rstd.reshape(rows)
            return y.to(x.dtype), x.new_empty(0), mean, rstd
    y, h, mean, rstd = _like(x, residual, weight, bias, scale, shift, dims, eps)
    if residual is None:
        h_, y_ = x, definition(x, residual, weight, bias, scale, shift, dims, eps)
    else:
        y_, h_ = definition(x, residual, weight, bias, scale, shift, dims, eps)
        h.copy_(h_)
    if x.numel():
        moments = torch.var_mean(h_.float().flatten(x.dim() - dims), -1, correction=0)
        rstd.copy_(moments[0].add(eps).rsqrt()), mean.copy_(moments[1])
    return y.copy_(y_), h, mean, rstd


def _decline(x: Tensor, *args: Any) -> Reason | None:
    n_cols = x.shape[x.dim() - args[-2] :].numel()
    tuned = _tuned.lookup("layer_norm", x.dtype, (n_cols,), device_of(x))
    return Reason.MEASURED if tuned is not None and tuned.variant == "torch" else None


Gradients = tuple[Gradient, Gradient, Gradient, Gradient, Gradient]


def _like_backward(
    dy: Tensor, dh: Any, h: Tensor, weight: Any, bias: Any, scale: Any, shift: Any, *rest: Any
) -> Gradients:
    return empty_gradients((h, weight, bias, scale, shift), rest[-1])


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor, dims: int, eps: float,
    needs: list[bool],
) -> Gradients:  # fmt: skip
    dx: Any = torch.empty_like(h, memory_format=torch.contiguous_format) if needs[0] else None
    groups, group_scale, _ = _by_group(h, scale, shift, dims)
    rows = as_rows(h, dims)
    by_group = launch_backward(
        dy, dh, rows, weight, bias, group_scale, mean, rstd, dx, groups,
        choose("layer_norm_backward", rows.shape[1], h.dtype, device_of(h)), any(needs[1:]),
    )  # fmt: skip
    if by_group is None:
        return dx, None, None, None, None
    lead = _leading(h, dims, scale, shift)
    into = ((0, weight), (1, bias), (2, scale), (1 if scale is None else 3, shift))
    factors: Any = [
        _into(by_group[kind], h, lead, dims, like) if need else None
        for need, (kind, like) in zip(needs[1:], into, strict=True)
    ]
    return dx, *factors


def _into(by_group: Tensor, h: Tensor, lead: int, dims: int, like: Any) -> Tensor:
    """Sums of columns [groups, columns], summed on to the shape of their factor."""
    n = h.dim() - dims
    full = by_group.view(*h.shape[:lead], *(1 for _ in range(n - lead)), *h.shape[n:])
    # a copy: outputs of an op share no memory
    return full.sum_to_size(like.shape).to(like.dtype, copy=True)


def _torch_backward(dy: Tensor, dh: Tensor | None, h: Tensor, *rest: Any) -> Gradients:
    *factors, _, _, dims, eps, needs = rest
    args = (h, None, *factors, dims, eps)
    dx, _, *others = gradients(definition, args, dy, [needs[0], False, *needs[1:]])[:6]
    return (dx if dx is None or dh is None else dx + dh), *others


FORWARD = LibraryOp("layer_norm", _forward, like=_like, torch_form=_torch_forward, decline=_decline)
BACKWARD = LibraryOp(
    "layer_norm_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        scale: Tensor | None, shift: Tensor | None, dims: int, eps: float,
    ) -> Any:  # fmt: skip
        y, h, mean, rstd = FORWARD.overload(x, residual, weight, bias, scale, shift, dims, eps)
        ctx.save_for_backward(x if residual is None else h, weight, bias, scale, shift, mean, rstd)
        ctx.options = (dims, eps)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        needs = [any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:6]]
        if dy is None:
            return dh, dh, None, None, None, None, None, None
        h, *factors, mean, rstd = ctx.saved_tensors
        if differentiating():
            # h is an output of this Function: its own path back to x and residual is added by
            # autograd
            args, wanted = (h, None, *factors, *ctx.options), [needs[0], False, *needs[1:]]
            dx, _, *others = second_derivative("layer_norm", definition, args, dy, wanted)[:6]
            dx = dx if dh is None or dx is None else dx + dh
        else:
            dx, *others = BACKWARD.overload(dy, dh, h, *factors, mean, rstd, *ctx.options, needs)
        into_x, into_residual = ctx.needs_input_grad[:2]
        return dx if into_x else None, dx if into_residual else None, *others, None, None


def _inference(x: Tensor, residual: Tensor | None, *args: Any) -> Any:
    y, h, *_ = FORWARD.overload(x, residual, *args)
    return y if residual is None else (y, h)


OP = Op("layer_norm", definition, LayerNormFunction, _inference)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Any:
    """norm(h) * weight + bias of h = input + residual, then * (1 + scale) + shift; with `prenorm`
    also h.
    """
    check("layer_norm", input, tuple(normalized_shape), weight=weight, bias=bias)
    input, weight, bias, residual, scale, shift = autocast_to_float32(
        input, weight, bias, residual, scale, shift
    )
    if residual is not None and not joins(residual, input):
        input, residual = input + residual, None
    late = [f for f in (scale, shift) if f is not None and not _modulates(f, input)]
    early = (scale, shift) if not late else (None, None)
    out = OP(input, residual, weight, bias, *early, len(normalized_shape), eps)
    y, h = (out, input) if residual is None else out
    if late:
        y = y if scale is None else y * (1 + scale)
        y = y if shift is None else y + shift
    return (y, h) if prenorm else y


def _modulates(factor: Tensor, input: Tensor) -> bool:
    """Whether applying the factor neither enlarges nor promotes the input."""
    grown = factor.dim() > input.dim() or any(
        f not in (1, n) for f, n in zip(factor.shape[::-1], input.shape[::-1], strict=False)
    )
    return factor.dtype == input.dtype and not grown


def _spell(*, adds: bool, prenorm: bool, scales: bool, shifts: bool, widens: bool) -> Spelling:
    """The op with or without what may stand around it; `widens` is a norm in float32 of less."""

    def pattern(
        x: Any, r: Any, shape: Any, w: Any, b: Any, eps: Any, scale: Any, shift: Any, dtype: Any
    ) -> Any:
        h = x + r if adds else x
        y = F.layer_norm(h.to(torch.float32) if widens else h, shape, w, b, eps)
        y = y.to(dtype) if widens else y
        y = y * (1 + scale) if scales else y
        y = y + shift if shifts else y
        return (y, h) if prenorm else y

    def call(
        x: Any, r: Any, shape: Any, w: Any, b: Any, eps: Any, scale: Any, shift: Any, dtype: Any
    ) -> partial[Any]:
        options = {"residual": r, "prenorm": prenorm or None, "scale": scale, "shift": shift}
        given = {k: v for k, v in options.items() if v is not None}
        return partial(layer_norm, x, shape, w, b, eps, **given)

    return Spelling(pattern, call)


# A shift alone is no modulation: it is mostly a residual, as large as the input.
SPELLINGS.extend(
    _spell(adds=adds, prenorm=prenorm, scales=scales, shifts=shifts, widens=widens)
    for widens in (False, True)
    for adds, prenorm in ((False, False), (True, False), (True, True))
    for scales, shifts in ((False, False), (True, False), (True, True))
)

"""Group normalization with the modulation, residual and activation after it."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._channels import (
    NO_ACT,
    Factors,
    Moments,
    backward,
    check_factors,
    finish,
    kept,
    launch_backward,
    launch_forward,
    of_definition,
)
from ._op import SPELLINGS, LibraryOp, Op, Spelling, autocast_to_float32, empty_gradients
from ._strides import joins
from .activation import ACTIVATIONS, Activations, apply_definition, lower, spelled, with_parameters


def definition(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, groups: int, eps: float,
    name: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(norm(x) (1 + scale) + shift + residual), normalized over groups of channels."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's gradient of a bias alone fails
    wide = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    weight, bias = (None if f is None else f.to(wide) for f in (weight, bias))
    y = F.group_norm(x.to(wide), groups, weight, bias, eps).to(x.dtype)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return apply_definition(y if residual is None else y + residual, name, a, b)


def _like(
    x: Tensor, residual: Any, weight: Any, bias: Any, scale: Any, shift: Any, groups: int, *act: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _factors(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None,
) -> Factors:  # fmt: skip
    shape = (*x.shape[:2], *(1 for _ in x.shape[2:]))

    def by_channel(factor: Tensor | None) -> Tensor | None:
        return None if factor is None else factor.expand(shape).flatten(1)

    return Factors(weight, bias, by_channel(scale), by_channel(shift))


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, groups: int, eps: float,
    name: str, a: float, b: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    moments = Moments(mean, torch.empty_like(mean))
    factors = _factors(x, weight, bias, scale, shift)
    return launch_forward(x, residual, factors, moments, eps, (name, a, b), groups), *moments[:2]


def _torch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, groups: int, *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, mean, var = _like(x, residual, weight, bias, scale, shift, groups, *options)
    y.copy_(definition(x, residual, weight, bias, scale, shift, groups, *options))
    if x.numel():
        found = torch.var_mean(x.float().reshape(*mean.shape, -1), -1, correction=0)
        var.copy_(found[0]), mean.copy_(found[1])
    return y, mean, var


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _like_backward(
    dy: Tensor, x: Tensor, z: Any, weight: Any, bias: Any, scale: Any, shift: Any, *rest: Any
) -> Gradients:
    needs = rest[-1]
    return (
        *empty_gradients((x, x), needs[:2], torch.preserve_format),
        *empty_gradients((weight, bias, scale, shift), needs[2:]),
    )


def _backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, mean: Tensor, var: Tensor, groups: int, eps: float,
    name: str, a: float, b: float, from_y: bool, needs: list[bool],
) -> Gradients:  # fmt: skip
    dx, g, sums = launch_backward(
        dy, x, z, from_y, _factors(x, weight, bias, scale, shift), Moments(mean, var), eps,
        (name, a, b), needs, groups,
    )  # fmt: skip
    factors: Any = (None, None, None, None)
    if sums is not None:
        factors = _of_factors(sums.view(2, *x.shape[:2]), x, weight, bias, scale, shift, needs[2:])
    return dx, g, *factors


def _of_factors(
    sums: Tensor, x: Tensor, weight: Any, bias: Any, scale: Any, shift: Any, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of weight, bias, scale and shift, of the sums of g and of g x_hat."""
    g, g_x_hat = sums
    shape = (*x.shape[:2], *(1 for _ in x.shape[2:]))
    factor = 1.0 if scale is None else 1 + scale.expand(shape).flatten(1).float()

    def of_scale() -> Tensor:
        dscale = g_x_hat if weight is None else g_x_hat * weight.float()
        return dscale if bias is None else dscale + g * bias.float()

    def into(by_channel: Tensor, like: Tensor) -> Tensor:
        # a copy: outputs of an op share no memory
        return by_channel.view(shape).sum_to_size(like.shape).to(like.dtype, copy=True)

    dweight, dbias, dscale, dshift = needs
    return [
        (g_x_hat * factor).sum(0).to(weight.dtype) if dweight else None,
        (g * factor).sum(0).to(bias.dtype) if dbias else None,
        into(of_scale(), scale) if dscale else None,
        into(g, shift) if dshift else None,
    ]


def _torch_backward(dy: Tensor, x: Tensor, z: Tensor | None, *rest: Any) -> Gradients:
    *factors, _, _, groups, eps, name, a, b, from_y, needs = rest
    return of_definition(definition, x, z, from_y, (*factors, groups, eps, name, a, b), dy, needs)


FORWARD = LibraryOp("group_norm", _forward, like=_like, torch_form=_torch_forward)
BACKWARD = LibraryOp(
    "group_norm_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class GroupNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        y, mean, var = FORWARD.overload(x, residual, *rest)
        *factors, groups, eps, name, a, b = rest
        z, ctx.from_y = kept(y, residual, name, a)
        ctx.save_for_backward(x, z, *factors, mean, var)
        ctx.options = (groups, eps, name, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, z, *factors, mean, var = ctx.saved_tensors
        found = backward(
            "group_norm", definition, x, z, ctx.from_y, (*factors, *ctx.options), dy,
            ctx.needs_input_grad[:6],
            lambda needs: BACKWARD.overload(
                dy, x, z, *factors, mean, var, *ctx.options, ctx.from_y, needs
            ),
        )  # fmt: skip
        return *found, *(None for _ in ctx.options)


def _inference(*args: Any) -> Tensor:
    return FORWARD.overload(*args)[0]


OP = Op("group_norm", definition, GroupNormFunction, _inference)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activations = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """act(norm(input) (1 + scale) + shift + residual), the norm with weight and bias over groups of
    channels.
    """
    _check(input, num_groups, weight, bias)
    input, weight, bias, residual, scale, shift = autocast_to_float32(
        input, weight, bias, residual, scale, shift
    )
    modulates = all(f is None or _of_channels(f, input) for f in (scale, shift))
    early = (scale, shift) if modulates else (None, None)
    act, module = lower("group_norm", activation)
    if modulates and joins(residual, input):
        y = OP(input, residual, weight, bias, *early, num_groups, eps, *act)
        return y if module is None else module(y)
    y = OP(input, None, weight, bias, *early, num_groups, eps, *NO_ACT)
    if not modulates:
        y = y if scale is None else y * (1 + scale)
        y = y if shift is None else y + shift
    return finish(y, residual, activation)


def _of_channels(factor: Tensor, input: Tensor) -> bool:
    """Whether the factor is one number a channel, of all samples or each, of the same dtype."""
    sizes = (1,) * (input.dim() - factor.dim()) + tuple(factor.shape)
    fits = len(sizes) == input.dim() and all(size == 1 for size in sizes[2:])
    fits = fits and all(f in (1, n) for f, n in zip(sizes, input.shape[:2], strict=False))
    return fits and factor.dtype == input.dtype


def _check(input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    shape = tuple(input.shape)
    if input.dim() < 2:
        raise RuntimeError(f"group_norm: input is {shape}, allowed are (N, C, ...)")
    if groups == 0:
        raise ZeroDivisionError("group_norm: num_groups is 0, it must be positive")
    if groups < 0 or shape[1] % groups:
        raise RuntimeError(
            f"group_norm: input is {shape}, num_groups is {groups}; it must be positive and divide"
            " the channels"
        )
    if math.prod(shape[2:], start=shape[0] * shape[1] // groups) == 1:
        raise ValueError(
            f"group_norm: input is {shape}, num_groups is {groups}; a group needs more than 1 value"
        )
    check_factors("group_norm", input, weight=weight, bias=bias)


def _spell(act: Callable[..., Tensor], name: str, modulates: bool, adds: bool) -> Spelling:
    """The op with this way to write its activation, with or without what stands before that."""

    def pattern(
        x: Any, groups: Any, w: Any, bias: Any, eps: Any, scale: Any, shift: Any, residual: Any,
        a: Any, b: Any,
    ) -> Tensor:  # fmt: skip
        y = F.group_norm(x, groups, w, bias, eps)
        y = y * (1 + scale) + shift if modulates else y
        return act(y + residual if adds else y, a, b)

    def call(
        x: Any, groups: Any, w: Any, bias: Any, eps: Any, scale: Any, shift: Any, residual: Any,
        a: Any, b: Any,
    ) -> partial[Any]:  # fmt: skip
        options = {
            "activation": None if name == "none" else with_parameters(name, a, b),
            "residual": residual, "scale": scale, "shift": shift,
        }  # fmt: skip
        given = {k: v for k, v in options.items() if v is not None}
        return partial(group_norm, x, groups, w, bias, eps, **given)

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(act, name, modulates, adds)
    for name in ACTIVATIONS
    for act in spelled(name)
    for modulates, adds in itertools.product((False, True), (False, True))
)

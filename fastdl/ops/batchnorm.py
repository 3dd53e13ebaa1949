"""Batch normalization with the residual and activation after it.

The library op is functional: running statistics are written outside of it, once.
"""

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
from ._op import SPELLINGS, Gradient, LibraryOp, Op, Spelling, copied, empty_gradients
from ._strides import joins
from .activation import ACTIVATIONS, Activations, apply_definition, lower, spelled, with_parameters


def definition(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    given_mean: Tensor | None, given_var: Tensor | None, tracks: bool, eps: float,
    name: str, a: float, b: float,
) -> Any:  # fmt: skip
    """act(norm(x) + residual), normalized over each channel with the mean and variance of the
    batch, or with given ones; where it `tracks`, also the batch's mean and unbiased variance.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch cannot differentiate a bias alone twice
    factors = (given_mean, given_var, weight, bias)
    mean, var, weight, bias = (None if f is None else f.to(wide) for f in factors)
    training = mean is None
    if tracks:
        # with a momentum of 1 torch leaves the batch's own in its running statistics
        mean, var = (x.new_zeros(x.shape[1], dtype=wide) for _ in range(2))
    y = F.batch_norm(x.to(wide), mean, var, weight, bias, training, 1.0, eps).to(x.dtype)
    y = apply_definition(y if residual is None else y + residual, name, a, b)
    return (y, mean, var) if tracks else y


def _like(
    x: Tensor, residual: Any, weight: Any, bias: Any, given_mean: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_statistics(x, given_mean)


def _statistics(x: Tensor, given_mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and unbiased variance of the batch; empty where these are given."""
    channels = x.shape[1] if given_mean is None else 0
    mean, var, unbiased = (x.new_empty(channels, dtype=torch.float32) for _ in range(3))
    return mean, var, unbiased


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    given_mean: Tensor | None, given_var: Tensor | None, eps: float,
    name: str, a: float, b: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, var, unbiased = _statistics(x, given_mean)
    moments = _moments(mean, var, given_mean, given_var)._replace(unbiased=unbiased)
    factors = Factors(weight, bias)
    y = launch_forward(x, residual, factors, moments, eps, (name, a, b), x.shape[1], pooled=True)
    return y, mean, var, unbiased


def _moments(mean: Any, var: Any, given_mean: Any, given_var: Any) -> Moments:
    if given_mean is None:
        return Moments(mean, var)
    return Moments(given_mean.contiguous(), given_var.contiguous(), given=True)


def _torch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    given_mean: Tensor | None, given_var: Tensor | None, eps: float,
    name: str, a: float, b: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    args = (x, residual, weight, bias, given_mean, given_var)
    y, mean, var, unbiased = _like(*args, eps, name, a, b)
    y.copy_(definition(*args, False, eps, name, a, b))
    if given_mean is None and x.numel():
        rows = x.float().movedim(1, 0).flatten(1)
        found = torch.var_mean(rows, -1, correction=0)
        var.copy_(found[0]), mean.copy_(found[1])
        unbiased.copy_(rows.var(-1))
    return y, mean, var, unbiased


Gradients = tuple[Gradient, Gradient, Gradient, Gradient]


def _like_backward(dy: Tensor, x: Tensor, z: Any, weight: Any, bias: Any, *rest: Any) -> Gradients:
    return empty_gradients((x, x, weight, bias), rest[-1], torch.preserve_format)


def _backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    given_mean: Tensor | None, given_var: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    name: str, a: float, b: float, from_y: bool, needs: list[bool],
) -> Gradients:  # fmt: skip
    dx, g, sums = launch_backward(
        dy, x, z, from_y, Factors(weight, bias), _moments(mean, var, given_mean, given_var),
        eps, (name, a, b), needs, x.shape[1], pooled=True,
    )  # fmt: skip
    if sums is None:
        return dx, g, None, None
    return dx, g, *copied(empty_gradients((weight, bias), needs[2:]), (sums[1], sums[0]))


def _torch_backward(dy: Tensor, x: Tensor, z: Tensor | None, *rest: Any) -> Gradients:
    *factors, _, _, eps, name, a, b, from_y, needs = rest
    return of_definition(definition, x, z, from_y, (*factors, False, eps, name, a, b), dy, needs)


FORWARD = LibraryOp("batch_norm", _forward, like=_like, torch_form=_torch_forward)
BACKWARD = LibraryOp(
    "batch_norm_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class BatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        given_mean: Tensor | None, given_var: Tensor | None, tracks: bool, *options: Any,
    ) -> Any:  # fmt: skip
        tensors = (weight, bias, given_mean, given_var)
        y, mean, var, unbiased = FORWARD.overload(x, residual, *tensors, *options)
        z, ctx.from_y = kept(y, residual, *options[1:3])
        ctx.save_for_backward(x, z, *tensors, mean, var)
        ctx.options = options
        ctx.set_materialize_grads(False)
        if not tracks:
            return y
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *of_statistics: Any) -> Any:
        x, z, *tensors, mean, var = ctx.saved_tensors
        if dy is None:
            return (None,) * (7 + len(ctx.options))
        found = backward(
            "batch_norm", definition, x, z, ctx.from_y, (*tensors, False, *ctx.options), dy,
            ctx.needs_input_grad[:4],
            lambda needs: BACKWARD.overload(
                dy, x, z, *tensors, mean, var, *ctx.options, ctx.from_y, needs
            ),
        )  # fmt: skip
        return *found, None, None, None, *(None for _ in ctx.options)


def _inference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    given_mean: Tensor | None, given_var: Tensor | None, tracks: bool, *options: Any,
) -> Any:  # fmt: skip
    y, mean, _, unbiased = FORWARD.overload(
        x, residual, weight, bias, given_mean, given_var, *options
    )
    return (y, mean, unbiased) if tracks else y


OP = Op("batch_norm", definition, BatchNormFunction, _inference)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activations = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(norm(input) + residual), the norm of each channel with weight and bias.

    In training the statistics are those of the batch, and the running ones, if there are any, take
    a step of `momentum` towards them. Else they are the running ones.
    """
    _check(input, running_mean, running_var, weight, bias, training, eps)
    act, module = lower("batch_norm", activation)
    if input.dim() < 2 or input.numel() == 0:
        # nothing to compute, and running statistics stay
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return finish(y, residual, activation)
    tracks = training and running_mean is not None
    given = (None, None) if training else (running_mean, running_var)
    fits = joins(residual, input)
    out = OP(
        input, residual if fits else None, weight, bias, *given, tracks, eps,
        *(act if fits else NO_ACT),
    )  # fmt: skip
    y = out[0] if tracks else out
    if tracks:
        _update(running_mean, out[1], momentum)
        _update(running_var, out[2], momentum)
    if not fits:
        return finish(y, residual, activation)
    return y if module is None else module(y)


def _update(running: Any, new: Tensor, momentum: float) -> None:
    with torch.no_grad():
        running.lerp_(new.to(running.dtype), momentum)


def _check(
    input: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, training: bool, eps: float,
) -> None:  # fmt: skip
    shape = tuple(input.shape)
    if training and math.prod(shape[2:], start=shape[0]) == 1:
        raise ValueError(
            f"batch_norm: input is {shape}; training needs more than 1 value a channel"
        )
    if eps < 0 or (training and eps == 0):
        allowed = "positive in training" if training else "0 or more"
        raise ValueError(f"batch_norm: eps is {eps}, it must be {allowed}")
    if training and (mean is None) != (var is None):
        raise ValueError("batch_norm: give both of running_mean and running_var, or neither")
    given = {"running_mean": mean, "running_var": var}
    for name, statistic in given.items():
        if statistic is None and not training:
            raise RuntimeError(f"batch_norm: {name} is None, evaluation needs it")
        if statistic is not None and statistic.requires_grad:
            raise RuntimeError(f"batch_norm: {name} requires a gradient, there is none of it")
    if input.dim() > 1:
        check_factors("batch_norm", input, **given, weight=weight, bias=bias)


def _spell(act: Callable[..., Tensor], name: str, adds: bool) -> Spelling:
    """The op with this way to write its activation. Both write the running statistics."""

    def pattern(
        x: Any, mean: Any, var: Any, w: Any, bias: Any, training: Any, momentum: Any, eps: Any,
        residual: Any, a: Any, b: Any,
    ) -> Tensor:  # fmt: skip
        y = F.batch_norm(x, mean, var, w, bias, training, momentum, eps)
        return act(y + residual if adds else y, a, b)

    def call(
        x: Any, mean: Any, var: Any, w: Any, bias: Any, training: Any, momentum: Any, eps: Any,
        residual: Any, a: Any, b: Any,
    ) -> partial[Any]:  # fmt: skip
        activation = None if name == "none" else with_parameters(name, a, b)
        options = {"activation": activation, "residual": residual}
        given = {k: v for k, v in options.items() if v is not None}
        return partial(batch_norm, x, mean, var, w, bias, training, momentum, eps, **given)

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(act, name, adds)
    for name in ACTIVATIONS
    for act in spelled(name)
    for adds in (False, True)
)

"""Causal convolution in which each channel has its own taps, as state-space models have it."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._finish import Extent, tile_of
from ._launch import Kernel, cdiv, device_of, launch, power_of_2
from ._op import (
    SPELLINGS,
    Gradient,
    LibraryOp,
    Op,
    Spelling,
    autocast_to_lower,
    differentiating,
    gradients,
    second_derivative,
)
from ._route import Reason
from .activation import (
    Activations,
    apply_definition,
    at_output,
    lower,
    same_layout,
    spelled,
    with_parameters,
)
from .conv_launch import FAR, Geometry, in_2d, launch_depthwise

CAUSAL_CONV1D_BWD = Kernel("causal_conv1d.causal_conv1d_bwd")

# Taps are unrolled, and their sums live in registers.
WIDEST = 16


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, name: str, a: float, b: float
) -> Tensor:
    """act(conv(x) + b), with zeros before the start alone."""
    z = F.conv1d(F.pad(x, (padding, 0)), weight.unsqueeze(1), bias, groups=x.shape[1])
    return apply_definition(z, name, a, b)


def _new_output(x: Tensor, length: Any) -> Tensor:
    """Positions or channels lie in a line, as in the input."""
    images, channels, _ = x.shape
    if x.stride(1) != 1:
        return x.new_empty((images, channels, length))
    return x.new_empty((images, length, channels)).transpose(1, 2)


def _length(x: Tensor, weight: Tensor, padding: int) -> Any:
    return x.shape[2] + padding - weight.shape[1] + 1


def _like(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    y = _new_output(x, _length(x, weight, padding))
    return y, torch.empty_like(y) if rest[-1] else y.new_empty(0)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int,
    name: str, a: float, b: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, z = _like(x, weight, bias, padding, name, a, b, keep)
    geometry = Geometry([1, 1], [0, padding], [1, 1], False, [0, 0], x.shape[1])
    tail = (None, None if bias is None else bias.contiguous(), None, y, z if keep else None)
    taps = weight[:, None, None]
    launch_depthwise(in_2d(x), taps, tail, in_2d(y), geometry, (name, a, b))
    return y, z


def _torch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    z = definition(x, weight, bias, padding, "none", 0.0, 0.0)
    y, kept = _like(x, weight, bias, padding, *rest)
    return y.copy_(apply_definition(z, *rest[:3])), kept.copy_(z) if rest[-1] else kept


def _decline(x: Tensor, weight: Tensor, *rest: Any) -> Reason | None:
    steps = ((n - 1) * step for n, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    return Reason.SIZE if weight.shape[1] > WIDEST or sum(steps) >= FAR else None


Gradients = tuple[Gradient, Gradient, Gradient]


def _like_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    needs = rest[-1]
    dx = _new_output(x, x.shape[2]) if needs[0] else None
    dweight = weight.new_empty(weight.shape) if needs[1] else None
    dbias = weight.new_empty(weight.shape[0]) if needs[2] else None
    return dx, dweight, dbias


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, padding: int,
    name: str, a: float, b: float, needs: list[bool],
) -> Gradients:  # fmt: skip
    (images, N, length), K = x.shape, weight.shape[1]
    dx = _new_output(x, length) if needs[0] else None
    dy = same_layout(dy, _new_output(x, dy.shape[2]) if z is None else z)
    device = device_of(x)
    config = tile_of(Extent(images, length, N, x.stride(1) != 1), 512, device)
    groups = cdiv(N, config["BLOCK_N"])
    parts = max(1, min(images * cdiv(length, config["BLOCK_M"]), 4 * device.sms // groups))
    partial_taps = x.new_empty((parts, K, N), dtype=torch.float32) if needs[1] else None
    partial_bias = x.new_empty((parts, N), dtype=torch.float32) if needs[2] else None
    launch(
        CAUSAL_CONV1D_BWD, (groups, parts),
        dy, z, x, weight.t().contiguous(), dx, partial_taps, partial_bias,
        images, length, dy.shape[2], N, padding,
        *x.stride(), *dy.stride()[1:], *(dy if dx is None else dx).stride()[1:], a, b,
        ACT=name, K=K, TAPS=power_of_2(K), config=config,
    )  # fmt: skip
    dweight = None if partial_taps is None else partial_taps.sum(0).t().to(x.dtype).contiguous()
    dbias = None if partial_bias is None else partial_bias.sum(0).to(x.dtype)
    return dx, dweight, dbias


def _torch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, padding: int, *rest: Any
) -> Gradients:
    *act, needs = rest
    dz = dy if z is None else gradients(apply_definition, (z, *act), dy, [True])[0]
    args = (x, weight, x.new_zeros(weight.shape[0]), padding, "none", 0.0, 0.0)
    dx, dweight, dbias = gradients(definition, args, dz, needs)[:3]
    dx = None if dx is None else _new_output(x, x.shape[2]).copy_(dx)
    return dx, dweight, dbias


FORWARD = LibraryOp(
    "causal_conv1d", _forward, like=_like, torch_form=_torch_forward, decline=_decline
)
BACKWARD = LibraryOp(
    "causal_conv1d_backward",
    _backward,
    like=_like_backward,
    torch_form=_torch_backward,
    decline=lambda dy, *args: _decline(*args),
)


class CausalConv1dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        name, a = options[1:3]
        curved = name != "none" and any(ctx.needs_input_grad[:3])
        from_y = curved and at_output(name, a)
        y, z = FORWARD.overload(x, weight, bias, *options, curved and not from_y)
        ctx.save_for_backward(x, weight, bias, (y if from_y else z) if curved else None)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, z = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if differentiating():
            args = (x, weight, bias, *ctx.options)
            grads = second_derivative("causal_conv1d", definition, args, dy, needs)[:3]
        else:
            grads = BACKWARD.overload(dy, x, weight, z, *ctx.options, needs)
        return *grads, *[None] * 4


def _inference(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return FORWARD.overload(x, weight, bias, *options, False)[0]


OP = Op("causal_conv1d", definition, CausalConv1dFunction, _inference)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    activation: Activations = None, initial_states: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(conv1d(x) + bias): output l sees the inputs up to l, each channel by its own weights.

    x is (batch, channels, length), and stays in its order in memory; the weight is (channels,
    width), or (channels, 1, width) as nn.Conv1d has it. `initial_states` (batch, channels,
    width - 1) are the inputs before the first; without them, zeros.
    """
    options, module = lower("causal_conv1d", activation)
    _check(x, weight, bias, initial_states)
    weight = weight.squeeze(1) if weight.dim() == 3 else weight
    padding = weight.shape[1] - 1
    if initial_states is not None:
        x, padding = torch.cat((initial_states, x), -1), 0
    x, weight, bias = autocast_to_lower(x, weight, bias)
    y = OP(x, weight, bias, padding, *options)
    return y if module is None else module(y)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None) -> None:
    shapes = weight.shape
    if len(shapes) not in (2, 3) or (len(shapes) == 3 and shapes[1] != 1):
        raise RuntimeError(
            f"causal_conv1d: weight is {tuple(shapes)}, allowed are (channels, width) and"
            " (channels, 1, width)"
        )
    if x.dim() != 3 or x.shape[1] != shapes[0] or shapes[-1] < 1:
        raise RuntimeError(
            f"causal_conv1d: x is {tuple(x.shape)}, weight is {tuple(shapes)}; allowed is"
            " x (batch, channels, length) with the weight's channels"
        )
    if bias is not None and bias.shape != shapes[:1]:
        raise RuntimeError(f"causal_conv1d: bias is {tuple(bias.shape)}, allowed is ({shapes[0]},)")
    past = (*x.shape[:2], shapes[-1] - 1)
    if initial_states is not None and initial_states.shape != past:
        raise RuntimeError(
            f"causal_conv1d: initial_states is {tuple(initial_states.shape)}, allowed is {past}"
        )
    for name, other in (("weight", weight), ("bias", bias), ("initial_states", initial_states)):
        if other is not None and (other.dtype, other.device) != (x.dtype, x.device):
            raise RuntimeError(
                f"causal_conv1d: x is {x.dtype} on {x.device}, {name} is {other.dtype} on"
                f" {other.device}; they must match"
            )


def _spell(act: Any, name: str, several: bool) -> Spelling:
    """A padded convolution of which the end is cut, with dimensions as numbers or tuples of one."""

    def pattern(x: Any, w: Any, bias: Any, a: Any, b: Any) -> Tensor:
        padding = (w.shape[-1] - 1,) if several else w.shape[-1] - 1
        z = F.conv1d(x, w, bias, 1, padding, 1, x.shape[1])
        return act(z[..., : x.shape[-1]], a, b)

    def call(x: Any, w: Any, bias: Any, a: Any, b: Any) -> partial[Any]:
        activation = None if name == "none" else with_parameters(name, a, b)
        return partial(causal_conv1d, x, w, bias, activation=activation)

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(act, name, several)
    for name in ("none", "silu")
    for act in spelled(name)
    for several in (False, True)
)

"""Convolutions with what follows them: act(conv(x) + b + residual)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import (
    Gradient,
    LibraryOp,
    Op,
    autocast_to_lower,
    differentiating,
    gradients,
    second_derivative,
)
from ._route import Reason
from .activation import (
    Activations,
    activation as apply_activation,
    apply_definition,
    at_output,
    lower,
)
from .batchnorm import batch_norm
from .conv_launch import Geometry, allocate, are_last, arranged, begin_backward, run_forward
from .conv_norm import BatchNorm, Norm, in_one_pass

Sizes = int | Sequence[int]


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int, name: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(conv(x) + b + residual)."""
    if transposed:
        z = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    elif len(stride) == 1:
        z = F.conv1d(x, weight, bias, stride, padding, dilation, groups)
    else:
        z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return apply_definition(z if residual is None else z + residual, name, a, b)


def _like(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    y = allocate(x, Geometry(*rest[:6]).output_shape(x, weight), are_last(x, weight))
    return y, torch.empty_like(y) if rest[-1] else y.new_empty(0)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int, name: str, a: float, b: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    return run_forward(x, weight, bias, residual, geometry, (name, a, b), keep)


def _torch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    last, plain = are_last(x, weight), (*rest[:6], "none", 0.0, 0.0)
    z = definition(x, weight, bias, residual, *plain)
    y = arranged(apply_definition(z, *rest[6:9]), last)
    return y, arranged(z, last) if rest[-1] else y.new_empty(0)


def _decline(x: Tensor, weight: Tensor, bias: Any, residual: Any, *rest: Any) -> Reason | None:
    return Reason.EMPTY if 0 in Geometry(*rest[:6]).output_shape(x, weight) else None


Gradients = tuple[Gradient, Gradient, Gradient, Gradient]


def _like_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    transposed, groups, name, needs = rest[4], rest[6], rest[7], rest[-1]
    last = are_last(x, weight)
    dx = allocate(x, x.shape, last) if needs[0] else None
    dweight = allocate(x, weight.shape, last) if needs[1] else None
    outs = weight.shape[1] * groups if transposed else weight.shape[0]
    dbias = x.new_empty(outs) if needs[2] else None
    dz = allocate(x, dy.shape, last) if needs[3] and name != "none" else None
    return dx, dweight, dbias, dz


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int, name: str, a: float, b: float, needs: list[bool],
) -> Gradients:  # fmt: skip
    """One pass for dz and the gradient of the bias, then torch's two products."""
    dz, dbias = (dy, None) if z is None else begin_backward(dy, z, (name, a, b), needs[2])
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    wanted = [needs[0], needs[1], needs[2] and dbias is None]
    found = _torch_gradients(dz, x, weight, geometry, wanted)
    dbias = found[2] if dbias is None else dbias
    return found[0], found[1], dbias, dz if needs[3] and z is not None else None


def _torch_gradients(
    dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Gradient, Gradient, Gradient]:
    if not any(needs):
        return None, None, None
    last, outs = are_last(x, weight), dz.shape[1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dz, x, weight, [outs], *geometry, needs
    )
    return (
        arranged(dx, last) if needs[0] else None,
        arranged(dweight, last) if needs[1] else None,
        dbias if needs[2] else None,
    )


def _torch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, *rest: Any
) -> Gradients:
    *options, needs = rest
    geometry, act = Geometry(*options[:6]), options[6:]
    dz = dy
    if z is not None:
        dz = arranged(gradients(apply_definition, (z, *act), dy, [True])[0], are_last(x, weight))
    found = _torch_gradients(dz, x, weight, geometry, needs[:3])
    return *found, dz if needs[3] and z is not None else None


FORWARD = LibraryOp("conv", _forward, like=_like, torch_form=_torch_forward, decline=_decline)
BACKWARD = LibraryOp("conv_backward", _backward, like=_like_backward, torch_form=_torch_backward)


class ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
        *options: Any,
    ) -> Tensor:  # fmt: skip
        name, a = options[6:8]
        curved = name != "none" and any(ctx.needs_input_grad[:4])
        from_y = curved and at_output(name, a)
        y, z = FORWARD.overload(x, weight, bias, residual, *options, curved and not from_y)
        saved_z = (y if from_y else z) if curved else None
        # the second derivative of the activation is taken where the residual has been added
        ctx.save_for_backward(x, weight, bias, residual if curved else None, saved_z)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, residual, z = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        dresidual = dy if needs[3] and z is None else None
        if not any(needs[:3]) and z is None:
            grads: Any = (None, None, None, None)
        elif differentiating():
            args = (x, weight, bias, residual, *ctx.options)
            among = [*needs[:3], needs[3] and z is not None]
            grads = second_derivative("conv", definition, args, dy, among)[:4]
        else:
            grads = BACKWARD.overload(dy, x, weight, z, *ctx.options, needs)
        return *grads[:3], grads[3] if dresidual is None else dresidual, *[None] * 9


def _inference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any
) -> Tensor:
    return FORWARD.overload(x, weight, bias, residual, *options, False)[0]


OP = Op("conv", definition, ConvFunction, _inference)


def conv1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1,
    padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1, *,
    activation: Activations = None, residual: Tensor | None = None, norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """act(norm(conv1d(input, weight) + bias) + residual)."""
    given = Given("conv1d", 1, stride, padding, dilation, groups)
    return _run(given, input, weight, bias, activation, residual, norm)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1,
    padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1, *,
    activation: Activations = None, residual: Tensor | None = None, norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """act(norm(conv2d(input, weight) + bias) + residual)."""
    given = Given("conv2d", 2, stride, padding, dilation, groups)
    return _run(given, input, weight, bias, activation, residual, norm)


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1,
    padding: Sizes = 0, output_padding: Sizes = 0, groups: int = 1, dilation: Sizes = 1, *,
    activation: Activations = None, residual: Tensor | None = None, norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """act(norm(conv_transpose2d(input, weight) + bias) + residual)."""
    given = Given("conv_transpose2d", 2, stride, padding, dilation, groups, output_padding)
    return _run(given, input, weight, bias, activation, residual, norm)


class Given(NamedTuple):
    """The options of a call as users give them. `output_padding` is None where nothing is
    transposed.
    """

    op: str
    dims: int
    stride: Sizes
    padding: Sizes | str
    dilation: Sizes
    groups: int
    output_padding: Sizes | None = None

    def geometry(self, kernel: Sequence[int]) -> tuple[Geometry, list[int]]:
        """The options in full, and what padding="same" needs on the far side beyond them."""
        stride, dilation = self._list("stride"), self._list("dilation")
        more = [0] * self.dims
        if isinstance(self.padding, str):
            padding, more = self._named_padding(kernel, stride, dilation)
        else:
            padding = self._list("padding")
        transposed = self.output_padding is not None
        after = self._list("output_padding") if transposed else [0] * self.dims
        for name, values, least in (
            ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
            ("groups", [self.groups], 1), ("output_padding", after, 0),
        ):  # fmt: skip
            if any(value < least for value in values):
                raise RuntimeError(f"{self.op}: {name} is {values}, allowed is {least} or more")
        for o, s, d in zip(after, stride, dilation, strict=True):
            if o >= max(s, d):
                raise RuntimeError(
                    f"{self.op}: output_padding is {after}; it must be smaller than"
                    f" stride {stride} or dilation {dilation}"
                )
        return Geometry(stride, padding, dilation, transposed, after, self.groups), more

    def _list(self, name: str) -> list[int]:
        value = getattr(self, name)
        values = list(value) if isinstance(value, Sequence) else [value]
        if len(values) not in (1, self.dims):
            raise RuntimeError(f"{self.op}: {name} is {value}, allowed are {self.dims} numbers")
        return values if len(values) == self.dims else values * self.dims

    def _named_padding(
        self, kernel: Sequence[int], stride: list[int], dilation: list[int]
    ) -> tuple[list[int], list[int]]:
        if self.padding not in ("same", "valid"):
            raise RuntimeError(
                f"{self.op}: padding is {self.padding!r}, allowed are 'same', 'valid' or numbers"
            )
        if self.padding == "valid":
            return [0] * self.dims, [0] * self.dims
        if any(s != 1 for s in stride):
            raise RuntimeError(f"{self.op}: padding is 'same', stride is {stride}; it must be 1")
        whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [n // 2 for n in whole], [n % 2 for n in whole]


def _run(
    given: Given, input: Tensor, weight: Tensor, bias: Tensor | None, activation: Activations,
    residual: Tensor | None, norm: Norm | None,
) -> Tensor:  # fmt: skip
    options, module = lower(given.op, activation)
    input, weight, bias = autocast_to_lower(input, weight, bias)
    _check(given, input, weight, bias)
    geometry, more = given.geometry(weight.shape[2:])
    single = input.dim() == given.dims + 1
    x = input.unsqueeze(0) if single else input
    if any(more):
        # an even kernel takes one more of the far side
        x = F.pad(x, [side for n in reversed(more) for side in (0, n)])
    shape = _check_extents(given, geometry, x, weight)
    joins = residual is None or (
        residual.dtype == x.dtype and list(residual.shape) == shape[single:]
    )
    if norm is not None:
        norm, y = BatchNorm(*norm), None
        if joins and not single and module is None:
            y = in_one_pass(x, weight, bias, residual, geometry, norm, options)
        if y is None:
            z = OP(x, weight, bias, None, *geometry, "none", 0.0, 0.0)
            z = z.squeeze(0) if single else z
            y = batch_norm(z, *norm, activation=activation, residual=residual)
        return y
    if residual is not None and (module is not None or not joins):
        # it is broadcast or promoted, or what follows is torch's
        z = OP(x, weight, bias, None, *geometry, "none", 0.0, 0.0)
        return apply_activation((z.squeeze(0) if single else z) + residual, activation)
    residual = residual.unsqueeze(0) if single and residual is not None else residual
    y = OP(x, weight, bias, residual, *geometry, *options)
    y = y.squeeze(0) if single else y
    return y if module is None else module(y)


def _check(given: Given, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op, dims, groups = given.op, given.dims, max(given.groups, 1)
    transposed = given.output_padding is not None
    if weight.dim() != dims + 2 or input.dim() not in (dims + 1, dims + 2):
        raise RuntimeError(
            f"{op}: input is {tuple(input.shape)}, weight is {tuple(weight.shape)}; allowed are"
            f" inputs of {dims + 1} or {dims + 2} dimensions and weights of {dims + 2}"
        )
    channels = input.shape[-1 - dims]
    taken = weight.shape[0] if transposed else weight.shape[1] * groups
    if channels != taken or weight.shape[0] % groups:
        raise RuntimeError(
            f"{op}: input is {tuple(input.shape)}, weight is {tuple(weight.shape)}, groups is"
            f" {given.groups}; the weight takes {taken} channels in, and its first dimension must"
            " be a multiple of groups"
        )
    outs = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outs):
        raise RuntimeError(f"{op}: bias is {tuple(bias.shape)}, allowed is ({outs},)")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype, other.device) != (input.dtype, input.device):
            raise RuntimeError(
                f"{op}: input is {input.dtype} on {input.device}, {name} is {other.dtype} on"
                f" {other.device}; they must match"
            )


def _check_extents(given: Given, geometry: Geometry, x: Tensor, weight: Tensor) -> list[Any]:
    """The shape of the output, which must have an extent."""
    shape = geometry.output_shape(x, weight)
    if any(n < 1 for n in shape[2:]):
        raise RuntimeError(
            f"{given.op}: input is {tuple(x.shape)}, weight is {tuple(weight.shape)}, padding is"
            f" {geometry.padding}; the kernel must fit into the padded input"
        )
    return shape

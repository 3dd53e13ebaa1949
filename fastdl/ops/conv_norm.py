"""A convolution with the batch norm after it, where the norm's statistics are given.

The norm is a number times what the convolution computes, plus another: it needs no pass of its own.
Both numbers are computed at each call, so there is nothing that could become stale.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _route
from ._channels import Factors, launch_affine
from ._op import LibraryOp
from .batchnorm import definition as norm_definition
from .conv_launch import Geometry, allocate, are_last, arranged, run_forward


class BatchNorm(NamedTuple):
    """The arguments of `batch_norm` after its input."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]


# As a user gives it.
Norm = BatchNorm | tuple[Tensor | float | None, ...]


def _like(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    shape = Geometry(*rest[6:12]).output_shape(x, weight)
    return allocate(x, shape, are_last(x, weight))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, gain: Tensor | None, offset: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int, eps: float, name: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    scale, shift = launch_affine(Factors(gain, offset), mean, var, bias, eps)
    return run_forward(x, weight, shift, residual, geometry, (name, a, b), False, scale)[0]


def _torch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, gain: Tensor | None, offset: Tensor | None, *rest: Any,
) -> Tensor:  # fmt: skip
    z = torch.convolution(x, weight, bias, *rest[:6])
    y = norm_definition(z, residual, gain, offset, mean, var, False, *rest[6:])
    return arranged(y, are_last(x, weight))


def _decline(x: Tensor, weight: Tensor, *rest: Any) -> _route.Reason | None:
    shape = Geometry(*rest[6:12]).output_shape(x, weight)
    return _route.Reason.EMPTY if 0 in shape else None


FORWARD = LibraryOp(
    "conv_batch_norm", _forward, like=_like, torch_form=_torch_forward, decline=_decline
)


def in_one_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry,
    norm: BatchNorm, options: Any,
) -> Tensor | None:  # fmt: skip
    """act(norm(conv(x) + b) + residual), or None where the norm is another op.

    In training it needs all of the convolution before its statistics are known, and a gradient of
    its weight needs the convolution's output.
    """
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return None
    outs = weight.shape[1] * geometry.groups if geometry.transposed else weight.shape[0]
    tensors = [t for t in (x, weight, bias, residual, *norm.tensors) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    fits = (t is None or (t.shape == (outs,) and t.device == x.device) for t in norm.tensors)
    if norm.eps < 0 or not all(fits) or _route.decide("conv_batch_norm", *tensors) is not None:
        return None
    given = (x, weight, bias, residual, *norm.tensors, *geometry, norm.eps, *options)
    return FORWARD.overload(*given)

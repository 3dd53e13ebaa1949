"""Convolutions."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF
from .norm import batch_norm_arguments


class Conv1d(nn.Conv1d):
    """:class:`torch.nn.Conv1d` on the fused kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return run_conv(input, self)


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` on the fused kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return run_conv(input, self)


class ConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` on the fused kernels."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return run_conv(input, self, output_size=output_size)


def run_conv(
    input: Tensor,
    conv: Any,
    activation: Any = None,
    norm: Any = None,
    residual: Tensor | None = None,
    output_size: list[int] | None = None,
) -> Tensor:
    """activation(norm(conv(input)) + residual), as one op; the norm is a module of batch norm."""
    given: Any = (conv.weight, conv.bias, conv.stride)
    kept: Any = {"activation": activation, "residual": residual}
    if norm is not None:
        kept["norm"] = batch_norm_arguments(input, norm)
    if conv.transposed:
        after = conv._output_padding(
            input, output_size, conv.stride, conv.padding, conv.kernel_size, 2, conv.dilation
        )
        rest: Any = (conv.padding, after, conv.groups, conv.dilation)
        return FF.conv_transpose2d(input, *given, *rest, **kept)
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    op: Any = FF.conv1d if isinstance(conv, nn.Conv1d) else FF.conv2d
    return op(input, *given, padding, conv.dilation, conv.groups, **kept)

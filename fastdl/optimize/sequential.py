"""nn.Sequential that runs neighbours as one op: a layer with its activation, a convolution with its
batch norm, a Linear with its dropout.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import nn as fused
from ..nn._children import is_plain as is_plain, run_linear
from ..nn._torchscript import scriptable
from ..nn.conv import run_conv
from ..nn.norm import run_batch_norm, run_group_norm
from ..ops.activation import BY_MODULE

ACTIVATIONS = frozenset(
    cls for cls in vars(fused).values() if isinstance(cls, type) and cls in BY_MODULE
)

# How a layer runs with the activation after it.
LAYERS: dict[type, Callable[..., Tensor]] = {
    fused.Linear: run_linear,
    **dict.fromkeys((fused.Conv1d, fused.Conv2d, fused.ConvTranspose2d), run_conv),
    **dict.fromkeys((fused.BatchNorm1d, fused.BatchNorm2d, fused.BatchNorm3d), run_batch_norm),
    fused.GroupNorm: run_group_norm,
}

# A norm that a convolution takes up.
NORMS: dict[type | None, type] = {
    fused.Conv1d: fused.BatchNorm1d,
    fused.Conv2d: fused.BatchNorm2d,
    fused.ConvTranspose2d: fused.BatchNorm2d,
}


@scriptable
class Sequential(nn.Sequential):
    """:class:`torch.nn.Sequential` that runs neighbours of fastdl's classes as one op.

    It has no plan of its own: what belongs together is found at each call. A child that got a hook,
    was replaced, wrapped or moved since is called as torch's Sequential calls it.
    """

    def forward(self, input: Any) -> Any:
        children = list(self)
        hooked = _has_any_global_hook()
        kinds = [type(child) if not hooked and is_plain(child) else None for child in children]
        start = 0
        while start < len(children):
            length = group_length(kinds, start)
            if length == 1:
                input = children[start](input)
            else:
                input = _run_group(input, *children[start : start + length])
            start += length
        return input


def group_length(kinds: Sequence[type | None], start: int) -> int:
    """How many classes from `start` on are one op. None stands for a module that must be called."""
    first, end = kinds[start], start + 1
    if first not in LAYERS:
        return 1
    if first in NORMS and end < len(kinds) and kinds[end] is NORMS[first]:
        end += 1
    if end < len(kinds) and kinds[end] in ACTIVATIONS:
        end += 1
    if first is fused.Linear and end < len(kinds) and kinds[end] is fused.Dropout:
        end += 1
    return end - start


def _run_group(input: Tensor, layer: nn.Module, *rest: nn.Module) -> Tensor:
    if type(rest[0]) is NORMS.get(type(layer)):
        return run_conv(input, layer, rest[1] if len(rest) > 1 else None, rest[0])
    if type(rest[-1]) is not fused.Dropout:
        return LAYERS[type(layer)](input, layer, rest[0])
    return run_linear(input, layer, rest[0] if len(rest) > 1 else None, rest[-1])

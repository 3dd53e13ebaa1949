"""nn.Sequential that runs as one op a Linear, its activation and its dropout, or a norm of channels
and its activation.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import nn as fused
from ..nn._children import is_plain as is_plain, run_linear
from ..nn.norm import run_batch_norm, run_group_norm
from ..ops.activation import BY_MODULE

ACTIVATIONS = frozenset(
    cls for cls in vars(fused).values() if isinstance(cls, type) and cls in BY_MODULE
)

_NORMS: dict[type, Callable[[Tensor, nn.Module, nn.Module], Tensor]] = {
    fused.GroupNorm: run_group_norm,
    fused.BatchNorm1d: run_batch_norm,
    fused.BatchNorm2d: run_batch_norm,
    fused.BatchNorm3d: run_batch_norm,
}


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
    if first is not fused.Linear and first not in _NORMS:
        return 1
    if end < len(kinds) and kinds[end] in ACTIVATIONS:
        end += 1
    if first is fused.Linear and end < len(kinds) and kinds[end] is fused.Dropout:
        end += 1
    return end - start


def _run_group(input: Tensor, first: nn.Module, *rest: nn.Module) -> Tensor:
    if type(first) in _NORMS:
        return _NORMS[type(first)](input, first, *rest)
    dropout = rest[-1] if type(rest[-1]) is fused.Dropout else None
    return run_linear(input, first, None if rest[0] is dropout else rest[0], dropout)

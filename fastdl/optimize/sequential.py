"""nn.Sequential that runs a Linear, its activation and its dropout as one op."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional as F, nn as fused
from ..ops.activation import BY_MODULE, has_hooks

ACTIVATIONS = frozenset(
    cls for cls in vars(fused).values() if isinstance(cls, type) and cls in BY_MODULE
)


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


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is its class's forward and nothing else."""
    return not has_hooks(module) and "forward" not in vars(module)


def group_length(kinds: Sequence[type | None], start: int) -> int:
    """How many classes from `start` on are one op. None stands for a module that must be called."""
    if kinds[start] is not fused.Linear:
        return 1
    end = start + 1
    if end < len(kinds) and kinds[end] in ACTIVATIONS:
        end += 1
    if end < len(kinds) and kinds[end] is fused.Dropout:
        end += 1
    return end - start


def _run_group(input: Tensor, linear: Any, *rest: Any) -> Tensor:
    p, training = 0.0, False
    if type(rest[-1]) is fused.Dropout:
        p, training, rest = rest[-1].p, rest[-1].training, rest[:-1]
    activation = rest[0] if rest else None
    return F.linear(
        input, linear.weight, linear.bias, activation=activation, dropout_p=p, training=training
    )

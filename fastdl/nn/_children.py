"""The op of a child in place of a call of it, where that makes no difference."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional as F
from ..ops.activation import has_hooks


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is its class's forward and nothing else."""
    return not has_hooks(module) and "forward" not in vars(module)


def is_one_of(module: Any, *classes: type) -> bool:
    """Whether the module is of one of these classes, and calling it is the forward that they have
    had since fastdl was imported.
    """
    cls = type(module)
    return (
        cls in classes
        and cls.forward is _FORWARDS.get(cls, cls.forward)
        and is_plain(module)
        and not _has_any_global_hook()
    )


# Another library may patch torch's classes.
_FORWARDS = {
    cls: cls.forward for cls in (nn.Linear, nn.Dropout, nn.LayerNorm, nn.MultiheadAttention)
}


def run_linear(
    input: Tensor,
    linear: Any,
    activation: Any = None,
    dropout: Any = None,
    residual: Tensor | None = None,
) -> Tensor:
    """dropout(activation(linear(input))) + residual, as one op."""
    p, training = (dropout.p, dropout.training) if dropout is not None else (0.0, False)
    return F.linear(
        input, linear.weight, linear.bias,
        activation=activation, residual=residual, dropout_p=p, training=training,
    )  # fmt: skip

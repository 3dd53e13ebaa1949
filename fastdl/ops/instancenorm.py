"""Instance normalization: group normalization with a group for every channel."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import _route
from ._channels import NO_ACT, check_factors, finish
from ._op import SPELLINGS, Spelling
from ._route import Reason
from ._strides import joins
from .activation import ACTIVATIONS, Activations, lower, spelled, with_parameters
from .batchnorm import batch_norm
from .groupnorm import OP


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activations = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(norm(input) + residual), the norm of each channel of each sample with weight and bias.

    Without `use_input_stats` the statistics are the running ones, as in batch_norm.
    """
    _check(input, running_mean, running_var, weight, bias, use_input_stats)
    if not use_input_stats:
        return batch_norm(
            input, running_mean, running_var, weight, bias, eps=eps,
            activation=activation, residual=residual,
        )  # fmt: skip
    act, module = lower("instance_norm", activation)
    if running_mean is not None:
        _route.report("instance_norm", "call", Reason.OPTION)
        y = F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        return finish(y, residual, activation)
    if not joins(residual, input):
        y = OP(input, None, weight, bias, None, None, input.shape[1], eps, *NO_ACT)
        return finish(y, residual, activation)
    y = OP(input, residual, weight, bias, None, None, input.shape[1], eps, *act)
    return y if module is None else module(y)


def _check(
    input: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, use_input_stats: bool,
) -> None:  # fmt: skip
    shape = tuple(input.shape)
    if use_input_stats and math.prod(shape[2:]) == 1:
        raise ValueError(
            f"instance_norm: input is {shape}; a channel needs more than 1 value of its own"
        )
    if (mean is None) != (var is None):
        raise ValueError("instance_norm: give both of running_mean and running_var, or neither")
    if mean is None and not use_input_stats:
        raise RuntimeError(
            "instance_norm: running_mean is None, without use_input_stats it is used"
        )
    check_factors(
        "instance_norm", input, running_mean=mean, running_var=var, weight=weight, bias=bias
    )


def _spell(act: Callable[..., Tensor], name: str) -> Spelling:
    """The op with this way to write its activation."""

    def pattern(
        x: Any, mean: Any, var: Any, w: Any, bias: Any, own: Any, momentum: Any, eps: Any,
        a: Any, b: Any,
    ) -> Tensor:  # fmt: skip
        return act(F.instance_norm(x, mean, var, w, bias, own, momentum, eps), a, b)

    def call(
        x: Any, mean: Any, var: Any, w: Any, bias: Any, own: Any, momentum: Any, eps: Any,
        a: Any, b: Any,
    ) -> partial[Any]:  # fmt: skip
        options: Any = {} if name == "none" else {"activation": with_parameters(name, a, b)}
        return partial(instance_norm, x, mean, var, w, bias, own, momentum, eps, **options)

    return Spelling(pattern, call)


SPELLINGS.extend(_spell(act, name) for name in ACTIVATIONS for act in spelled(name))

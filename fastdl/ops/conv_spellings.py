"""How people write convolutions with what follows them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ._op import SPELLINGS, Spelling
from .activation import ACTIVATIONS, spelled, with_parameters
from .conv import conv1d, conv2d, conv_transpose2d
from .conv_norm import BatchNorm


def _spell(op: Callable[..., Any], act: Any, name: str, norms: bool, adds: bool) -> Spelling:
    """The op with this way to write its activation, a batch norm of given statistics and a
    residual before it or none.
    """
    function = getattr(F, op.__name__)

    def written(args: Any, norm: Any, residual: Any, a: Any, b: Any) -> Tensor:
        z = function(*args)
        if norms:
            mean, var, gain, offset, momentum, eps = norm
            z = F.batch_norm(z, mean, var, gain, offset, False, momentum, eps)
        return act(z + residual if adds else z, a, b)

    def fused(args: Any, norm: Any, residual: Any, a: Any, b: Any) -> partial[Any]:
        mean, var, gain, offset, momentum, eps = norm
        options = {
            "activation": None if name == "none" else with_parameters(name, a, b),
            "residual": residual,
            "norm": BatchNorm(mean, var, gain, offset, False, momentum, eps) if norms else None,
        }
        return partial(op, *args, **{k: v for k, v in options.items() if v is not None})

    parameters = _transposed if op is conv_transpose2d else _direct
    return Spelling(parameters(written), parameters(fused))


def _direct(form: Callable[..., Any]) -> Callable[..., Any]:
    """With the arguments of a call one by one."""
    return lambda x, w, bias, s, p, d, g, mean, var, gain, offset, m, e, r, a, b: form(
        (x, w, bias, s, p, d, g), (mean, var, gain, offset, m, e), r, a, b
    )


def _transposed(form: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w, bias, s, p, o, g, d, mean, var, gain, offset, m, e, r, a, b: form(
        (x, w, bias, s, p, o, g, d), (mean, var, gain, offset, m, e), r, a, b
    )


SPELLINGS.extend(
    _spell(op, act, name, norms, adds)
    for op in (conv1d, conv2d, conv_transpose2d)
    for name in ACTIVATIONS
    for act in spelled(name)
    for norms in (False, True)
    for adds in (False, True)
)

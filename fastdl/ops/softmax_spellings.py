"""The ways in which people write softmax."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import SPELLINGS, Spelling, form_of
from .softmax import log_softmax, softmax, softmin

Step = Callable[..., Any]


@form_of("softmax")
def softmax_of_hidden(
    input: Tensor,
    hidden: Tensor,
    dim: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    log: bool = False,
    scale: float = 1.0,
    fill: float = -math.inf,
) -> Tensor:
    """Softmax, or its logarithm, with a mask that is True where logits are hidden."""
    if hidden.dtype != torch.bool:
        raise RuntimeError(f"softmax: hidden is {hidden.dtype}, allowed is bool")
    function = log_softmax if log else softmax
    return function(input, dim, dtype=dtype, scale=scale, mask=~hidden, fill=fill)


def _wide(x: Any) -> Any:
    return x.to(torch.float32)


def _over(by: Any) -> Any:
    # what is no number is refused later, with a reason
    return 1.0 / by if isinstance(by, (int, float)) and by else by


# How logits are scaled, and what the scale is then.
_SCALES: list[tuple[Step, Step]] = [
    (lambda x, by: x, lambda by: None),
    (lambda x, by: x * by, lambda by: by),
    (lambda x, by: x / by, _over),
    (lambda x, by: -x, lambda by: -1.0),
]

# How they are masked, and the option that takes the mask.
_MASKS: list[tuple[Step, str]] = [
    (lambda s, mask, fill: s, ""),
    (lambda s, mask, fill: s + mask, "mask"),
    (lambda s, mask, fill: s.masked_fill(mask, fill), "hidden"),
    (lambda s, mask, fill: torch.where(mask, s, fill), "mask"),
]

# How softmax f of s, the changed x, is cast, and whether the result is still in float32. In an f of
# one argument the dtype of the call is left open.
_CASTS: list[tuple[Step, bool]] = [
    (lambda f, s, x: f(s(x)), False),
    (lambda f, s, x: f(s(x), torch.float32).to(x.dtype), False),
    (lambda f, s, x: f(_wide(s(x)), None).to(x.dtype), False),
    (lambda f, s, x: f(_wide(s(x)), None), True),
    (lambda f, s, x: f(s(_wide(x)), None).to(x.dtype), False),
    (lambda f, s, x: f(s(_wide(x)), None), True),
]

_FUNCTIONS = {False: (torch.softmax, softmax), True: (torch.log_softmax, log_softmax)}


def _given(**options: Any) -> dict[str, Any]:
    return {name: x for name, x in options.items() if x is not None}


def _spell(scaled: tuple[Step, Step], masked: tuple[Step, str], cast: Any, log: bool) -> Spelling:
    (scales, factor), (masks, option), (casts, widens) = scaled, masked, cast
    torchs, ours = _FUNCTIONS[log]

    def pattern(x: Any, by: Any, mask: Any, fill: Any, dim: Any, dtype: Any) -> Any:
        return casts(
            lambda s, kind=dtype: torchs(s, dim, dtype=kind),
            lambda x: masks(scales(x, by), mask, fill),
            x,
        )

    def call(x: Any, by: Any, mask: Any, fill: Any, dim: Any, dtype: Any) -> partial[Any]:
        options = _given(
            dtype=torch.float32 if widens else dtype, scale=factor(by), fill=fill,
        )  # fmt: skip
        if option == "hidden":
            return partial(softmax_of_hidden, x, mask, dim, log=log, **options)
        return partial(ours, x, dim, **options, **_given(mask=mask))

    return Spelling(pattern, call)


def _unlike(scaled: Any, masked: Any, cast: Any) -> bool:
    """Whether a cast before logits are changed is another one than a cast after that."""
    changed = scaled is not _SCALES[0] or masked is not _MASKS[0]
    return changed or cast not in _CASTS[4:]


SPELLINGS.extend(
    _spell(scaled, masked, cast, log)
    for scaled, masked, cast, log in itertools.product(_SCALES, _MASKS, _CASTS, (False, True))
    if _unlike(scaled, masked, cast)
)
SPELLINGS.append(
    Spelling(
        lambda x, dim, dtype: F.softmin(x, dim, dtype=dtype),
        lambda x, dim, dtype: partial(softmin, x, dim, dtype=dtype),
    )
)

# The exponentials of rows, less their maximum or not.
_EXPONENTIALS: list[Step] = [
    lambda x, dim: torch.exp(x - torch.max(x, dim, keepdim=True)[0]),
    lambda x, dim: torch.exp(x - torch.max(x, dim, keepdim=True)[0].detach()),
    lambda x, dim: torch.exp(x - torch.amax(x, dim, keepdim=True)),
    lambda x, dim: torch.exp(x - torch.amax(x, dim, keepdim=True).detach()),
    lambda x, dim: torch.exp(x),
]


def _shares(e: Any, dim: Any) -> Any:
    return e / e.sum(dim, keepdim=True)


def _one(dim: Any) -> Any:
    """The dimension, if it is written as a list of one."""
    return dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim


SPELLINGS.extend(
    Spelling(
        lambda x, dim, of=of: _shares(of(x, dim), dim),
        lambda x, dim: partial(softmax, x, _one(dim)),
    )
    for of in _EXPONENTIALS
)

_LOGARITHMS: list[Step] = [
    lambda x, dim: x - torch.logsumexp(x, dim, keepdim=True),
    lambda x, dim: x - torch.log(torch.exp(x).sum(dim, keepdim=True)),
    lambda x, dim: torch.log(torch.softmax(x, dim)),
    *((lambda x, dim, of=of: torch.log(_shares(of(x, dim), dim))) for of in _EXPONENTIALS),
]  # fmt: skip

SPELLINGS.extend(
    Spelling(written, lambda x, dim: partial(log_softmax, x, _one(dim))) for written in _LOGARITHMS
)

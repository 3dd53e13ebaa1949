"""The ways in which people write cross entropy, with and without the linear layer before it."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cross_entropy as fused, linear_cross_entropy as fused_linear
from ._op import SPELLINGS, Spelling, form_of, same_call
from .cross_entropy import cross_entropy, in_autocast
from .linear_cross_entropy import linear_cross_entropy
from .nll_loss import nll_loss

# Where torch has no index to ignore.
NO_INDEX = -(2**62)

Step = Callable[..., Any]


def _as_rows(x: Tensor, classes: int, layout: str, width: int | None, shifted: bool) -> Tensor:
    """[..., features] as the rows that people made of it. Raises where theirs are others."""
    if layout == "as it is":
        return x
    if layout == "view" and width != classes:
        raise RuntimeError(f"rows of {width} where there are {classes} classes")
    if x.dim() != 3 and (shifted or layout == "flatten"):
        raise RuntimeError(f"input is {tuple(x.shape)}, it must have three dimensions")
    x = x[:, :-1] if shifted else x
    return x.reshape(-1, x.shape[-1])


@form_of("cross_entropy")
def cross_entropy_of_rows(
    input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """cross_entropy of softcap tanh(input / softcap), computed in float32 of less if `wide`, of the
    rows that `layout` makes; `shifted` drops the last of each sequence before.
    """
    return _of_rows(input, None, target, weight, **options)


@form_of("linear_cross_entropy")
def linear_cross_entropy_of_rows(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """linear_cross_entropy, likewise."""
    return _of_rows(input, (linear_weight, linear_bias), target, weight, **options)


def _of_rows(
    input: Tensor, head: tuple[Tensor, Tensor | None] | None, target: Tensor,
    weight: Tensor | None, *, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, layout: str = "as it is", width: int | None = None,
    shifted: bool = False, wide: bool = False, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    classes = input.shape[-1] if head is None else head[0].shape[0]
    rows = _as_rows(input, classes, layout, width, shifted)
    options: Any = (
        target, weight, reduction, ignore_index, label_smoothing, 0.0, softcap,
        wide or in_autocast(input),
    )  # fmt: skip
    if head is None:
        return fused.run(rows, *options)
    if rows.dim() > 2:
        raise RuntimeError(f"input is {tuple(rows.shape)}, it must be rows")
    arguments: Any = (rows, *head, *options, 0)
    return fused_linear.run(*arguments)


@form_of("cross_entropy")
def cross_entropy_of_log_softmax(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int,
    ignore_index: int = -100,
    reduction: str = "mean",
    wide: bool = False,
) -> Tensor:
    """nll_loss of log_softmax over the classes."""
    if dim % input.dim() != min(input.dim() - 1, 1):
        raise RuntimeError(f"log_softmax is of dimension {dim}, which are not the classes")
    return fused.run(
        input, target, weight, reduction, ignore_index, 0.0, 0.0, 0.0, wide or in_autocast(input)
    )


@form_of("cross_entropy")
def chosen_log_softmax(input: Tensor, index: Tensor, *, wide: bool = False) -> Tensor:
    """The log_softmax over the last dimension at one index a row."""
    if tuple(index.shape) != tuple(input.shape[:-1]):
        raise RuntimeError(f"input is {tuple(input.shape)}, index is {tuple(index.shape)}")
    rows = input.reshape(-1, input.shape[-1])
    loss = fused.run(
        rows, index.reshape(-1), None, "none", NO_INDEX, 0.0, 0.0, 0.0, wide or in_autocast(input)
    )
    return -loss.view(index.shape)


@form_of("cross_entropy")
def smoothed_cross_entropy(
    input: Tensor, target: Tensor, *, confidence: float, smoothing: float, reduction: str
) -> Tensor:
    """confidence times the loss of the class plus smoothing times the mean loss of all."""
    if abs(confidence + smoothing - 1.0) > 1e-9 or input.dim() != 2:
        raise RuntimeError(f"shares are {confidence} and {smoothing}, and must add up to 1")
    return fused.run(
        input, target, None, reduction, NO_INDEX, smoothing, 0.0, 0.0, in_autocast(input)
    )


@form_of("cross_entropy")
def soft_cross_entropy(input: Tensor, target: Tensor, *, reduction: str) -> Tensor:
    """-sum(target log_softmax(input)) of rows."""
    if input.dim() != 2 or not target.is_floating_point():
        raise RuntimeError(f"input is {tuple(input.shape)}, and must be [rows, classes]")
    return cross_entropy(input, target, reduction=reduction)


def _wide(x: Any) -> Any:
    return x.to(torch.float32)


_SHIFTS: list[Step] = [
    lambda z: z[..., :-1, :],
    lambda z: z[:, :-1, :],
    lambda z: z[:, :-1],
]

# How logits become rows, what that is called, and whether the last of a sequence is dropped.
_LAYOUTS: list[tuple[Step, str, bool]] = [
    (lambda z, n, v: z, "as it is", False),
    (lambda z, n, v: z.view(n, v), "view", False),
    (lambda z, n, v: z.reshape(n, v), "view", False),
    (lambda z, n, v: z.flatten(0, 1), "flatten", False),
    *(
        (lambda z, n, v, shift=shift, end=end: end(shift(z), n, v), name, True)
        for shift in _SHIFTS
        for end, name in (
            (lambda z, n, v: z.contiguous().view(n, v), "view"),
            (lambda z, n, v: z.contiguous().reshape(n, v), "view"),
            (lambda z, n, v: z.reshape(n, v), "view"),
            (lambda z, n, v: z.flatten(0, 1), "flatten"),
        )
    ),
]

# Before the layout, after it, or never: where people go to float32.
_WIDENINGS = ("never", "before", "after")


def _spell(layout: tuple[Step, str, bool], widens: str, caps: bool, head: bool) -> Spelling:
    rows, name, shifted = layout

    def pattern(
        x: Any, lw: Any, lb: Any, t: Any, w: Any, n: Any, v: Any, cap: Any,
        ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        z = F.linear(x, lw, lb) if head else x
        z = torch.tanh(z / cap) * cap if caps else z
        z = _wide(z) if widens == "before" else z
        z = rows(z, n, v)
        z = _wide(z) if widens == "after" else z
        return F.cross_entropy(
            z, t, w, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing,
        )  # fmt: skip

    def call(
        x: Any, lw: Any, lb: Any, t: Any, w: Any, n: Any, v: Any, cap: Any, **options: Any
    ) -> partial[Any]:
        more = {
            **({} if name == "as it is" else {"layout": name}),
            **({"width": v} if name == "view" else {}), **({"shifted": True} if shifted else {}),
            **({} if widens == "never" else {"wide": True}), **({"softcap": cap} if caps else {}),
        }  # fmt: skip
        if more:
            of_rows: Any = linear_cross_entropy_of_rows if head else cross_entropy_of_rows
            return partial(of_rows, x, *((lw, lb) if head else ()), t, w, **options, **more)
        if not head:
            return partial(cross_entropy, x, t, w, **options)
        if options["ignore_index"] == -100:
            options["ignore_index"] = None  # probabilities have none
        return partial(linear_cross_entropy, x, lw, t, linear_bias=lb, weight=w, **options)

    return Spelling(pattern, call)


SPELLINGS.extend(
    _spell(layout, widens, caps, head)
    for layout, widens, caps, head in itertools.product(
        _LAYOUTS, _WIDENINGS, (False, True), (False, True)
    )
    if layout is not _LAYOUTS[0] or widens != "after"
    # views alone change nothing that the kernels read
    if head or caps or widens == "before" or layout is _LAYOUTS[0]
)


def _spell_log_softmax(log_softmax: Step, wide: bool) -> Spelling:
    """nll_loss of log_softmax."""
    options: Any = {"wide": True} if wide else {}

    def pattern(
        input: Any, dim: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any
    ) -> Any:
        return F.nll_loss(
            log_softmax(input, dim), target, weight, ignore_index=ignore_index, reduction=reduction
        )

    def call(**given: Any) -> partial[Any]:
        return partial(cross_entropy_of_log_softmax, **given, **options)

    return Spelling(pattern, call)


def _spell_chosen(log_softmax: Step, wide: bool) -> Spelling:
    """log_softmax at one index a row."""
    options: Any = {"wide": True} if wide else {}
    return Spelling(
        lambda x, i: log_softmax(x, -1).gather(-1, i.unsqueeze(-1)).squeeze(-1),
        lambda x, i: partial(chosen_log_softmax, x, i, **options),
    )


_LOG_SOFTMAXES: list[tuple[Step, bool]] = [
    (lambda x, dim: F.log_softmax(x, dim), False),
    (lambda x, dim: F.log_softmax(x, dim, dtype=torch.float32), True),
    (lambda x, dim: F.log_softmax(_wide(x), dim), True),
]
SPELLINGS.extend(_spell_log_softmax(*way) for way in _LOG_SOFTMAXES)
SPELLINGS.extend(_spell_chosen(*way) for way in _LOG_SOFTMAXES)

SPELLINGS.append(same_call(F.nll_loss, nll_loss))


def _spell_smoothed(end: Step, reduction: str, dim: int) -> Spelling:
    def pattern(x: Any, t: Any, c: Any, s: Any) -> Any:
        log_p = F.log_softmax(x, -1)
        nll = (-log_p.gather(-1, t.unsqueeze(dim))).squeeze(dim)
        return end(c * nll + s * (-log_p.mean(-1)))

    def call(x: Any, t: Any, c: Any, s: Any) -> partial[Any]:
        return partial(smoothed_cross_entropy, x, t, confidence=c, smoothing=s, reduction=reduction)

    return Spelling(pattern, call)


def _spell_soft(product: Step, end: Step, reduction: str) -> Spelling:
    return Spelling(
        lambda x, t: end(product(t, F.log_softmax(x, -1))),
        lambda x, t: partial(soft_cross_entropy, x, t, reduction=reduction),
    )


_ENDS: list[tuple[Step, str]] = [
    (lambda loss: loss, "none"),
    (lambda loss: loss.mean(), "mean"),
    (lambda loss: loss.sum(), "sum"),
]
SPELLINGS.extend(_spell_smoothed(end, name, dim) for end, name in _ENDS for dim in (1, -1))
SPELLINGS.extend(
    _spell_soft(product, end, name)
    for product in (
        lambda t, log_p: (-t * log_p).sum(-1),
        lambda t, log_p: -(t * log_p).sum(-1),
    )
    for end, name in _ENDS
)

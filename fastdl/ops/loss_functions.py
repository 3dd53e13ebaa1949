"""The losses under torch's names, and the ways in which people write them."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import SPELLINGS, Spelling, form_of, same_call
from ._reduction import reduction_of
from .losses import pointwise


def _together(op: str, input: Tensor, target: Tensor, warn: bool = True) -> tuple[Tensor, Tensor]:
    """Both in the shape that they broadcast to, of which torch warns."""
    if input.shape == target.shape:
        return input, target
    sizes = zip(reversed(input.shape), reversed(target.shape), strict=False)
    if not all(m == n or m == 1 or n == 1 for m, n in sizes):
        raise RuntimeError(
            f"{op}: input is {tuple(input.shape)}, target is {tuple(target.shape)};"
            " they must be of one shape, or broadcast to one"
        )
    if warn:
        warnings.warn(
            f"{op}: input is {tuple(input.shape)}, target is {tuple(target.shape)}: they are"
            " broadcast, which is seldom meant",
            stacklevel=3,
        )
    input, target = torch.broadcast_tensors(input, target)
    return input, target


def _check_weight(op: str, input: Tensor, weight: Tensor | None) -> None:
    if weight is not None and weight.shape != input.shape:
        raise ValueError(
            f"{op}: input is {tuple(input.shape)}, weight is {tuple(weight.shape)};"
            " they must be of one shape"
        )


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """(input - target)² times the weight, whose sum a weighted mean is over."""
    reduction = reduction_of("mse_loss", size_average, reduce, reduction)
    x, t = _together("mse_loss", input, target)
    return _weighted("mse_loss", "mse", input, x, t, weight, reduction)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """|input - target| times the weight, whose sum a weighted mean is over."""
    reduction = reduction_of("l1_loss", size_average, reduce, reduction)
    x, t = _together("l1_loss", input, target)
    return _weighted("l1_loss", "l1", input, x, t, weight, reduction)


def _weighted(
    op: str, loss: str, input: Tensor, x: Tensor, t: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    _check_weight(op, input, weight)
    if weight is not None and reduction == "mean":
        reduction = "weighted"
    return pointwise(x, t, loss, reduction, weight=weight)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """d² / (2 beta) of the error d where |d| < beta, else |d| - beta / 2."""
    reduction = reduction_of("smooth_l1_loss", size_average, reduce, reduction)
    if beta < 0:
        raise RuntimeError(f"smooth_l1_loss: beta is {beta}, it must not be negative")
    x, t = _together("smooth_l1_loss", input, target)
    return pointwise(x, t, "smooth_l1" if beta else "l1", reduction, beta)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """d² / 2 of the error d where |d| <= delta, else delta (|d| - delta / 2), times the weight."""
    reduction = reduction_of("huber_loss", None, None, reduction)
    if delta <= 0:
        raise RuntimeError(f"huber_loss: delta is {delta}, it must be positive")
    x, t = _together("huber_loss", input, target)
    _check_weight("huber_loss", input, weight)
    return pointwise(x, t, "huber", reduction, delta, weight)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """target (log(target) - input), input a logarithm, target one too with `log_target`.

    "batchmean" is the sum over the size of the first dimension.
    """
    legacy = size_average is not None or reduce is not None
    reduction = reduction_of(
        "kl_div", size_average, reduce, reduction, ("none", "batchmean", "mean", "sum")
    )
    if reduction == "mean" and not legacy:
        warnings.warn(
            "kl_div: reduction is 'mean', over all elements; the divergence is 'batchmean'",
            stacklevel=2,
        )
    if input.dtype != target.dtype and 0 in (input.dim(), target.dim()):
        dtype = torch.result_type(input, target)
        input, target = input.to(dtype), target.to(dtype)
    x, t = _together("kl_div", input, target, warn=False)
    loss = "kl_log" if log_target else "kl"
    if reduction != "batchmean" or x.shape == input.shape:
        return pointwise(
            x, t, loss, reduction if input.dim() or reduction != "batchmean" else "sum"
        )
    total = pointwise(x, t, loss, "sum")
    return total / input.shape[0] if input.dim() else total


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """-(pos_weight target log σ(input) + (1 - target) log(1 - σ(input))), times the weight."""
    op = "binary_cross_entropy_with_logits"
    reduction = reduction_of(op, size_average, reduce, reduction)
    if input.shape != target.shape:
        raise ValueError(
            f"{op}: input is {tuple(input.shape)}, target is {tuple(target.shape)};"
            " they must be of one shape"
        )
    for name, factor in (("weight", weight), ("pos_weight", pos_weight)):
        if factor is not None and not _broadcasts(factor, input):
            raise RuntimeError(
                f"{op}: input is {tuple(input.shape)}, {name} is {tuple(factor.shape)};"
                f" {name} must broadcast to input"
            )
    return pointwise(input, target, "bce", reduction, weight=weight, pos_weight=pos_weight)


def _broadcasts(factor: Tensor, x: Tensor) -> bool:
    sizes = zip(reversed(factor.shape), reversed(x.shape), strict=False)
    return factor.dim() <= x.dim() and all(m == n or m == 1 for m, n in sizes)


@form_of("mse_loss")
def mse_of_difference(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """mse_loss as it is when people write it out: nobody is warned of shapes."""
    x, t = _together("mse_loss", input, target, warn=False)
    return pointwise(x, t, "mse", reduction)


@form_of("l1_loss")
def l1_of_difference(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """l1_loss as it is when people write it out: nobody is warned of shapes."""
    x, t = _together("l1_loss", input, target, warn=False)
    return pointwise(x, t, "l1", reduction)


def _spell_out(
    difference: Callable[[Any], Any], loss: Callable[..., Tensor], reduction: str
) -> Spelling:
    """The loss of a difference written out, and its mean or sum."""

    def pattern(input: Any, target: Any) -> Any:
        return getattr(difference(input - target), reduction)()

    def call(input: Any, target: Any) -> "partial[Any]":
        return partial(loss, input, target, reduction)

    return Spelling(pattern, call)


SPELLINGS.extend(
    same_call(getattr(F, ours.__name__), ours)
    for ours in (
        mse_loss, l1_loss, smooth_l1_loss, huber_loss, kl_div, binary_cross_entropy_with_logits,
    )
)  # fmt: skip
SPELLINGS.extend(
    _spell_out(difference, loss, reduction)
    for difference, loss in (
        (lambda d: d.pow(2), mse_of_difference), (lambda d: d * d, mse_of_difference),
        (lambda d: d.abs(), l1_of_difference),
    )
    for reduction in ("mean", "sum")
)  # fmt: skip

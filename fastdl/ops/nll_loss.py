"""Negative log likelihood of classes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _classes
from ._launch import Config, Kernel, cdiv, device_of, launch
from ._op import LibraryOp, Op, differentiating, gradients, second_derivative
from ._reduction import reduction_of
from ._route import Reason
from .cross_entropy import config_for, in_autocast

NLL_LOSS_FWD = Kernel("nll_loss.nll_loss_fwd")
NLL_LOSS_BWD = Kernel("nll_loss.nll_loss_bwd")


def definition(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> Tensor:
    """-weight x of each row's class."""
    return F.nll_loss(x, target, weight, ignore_index=ignore_index, reduction=reduction)


def _like(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _classes.like_reduced(x, x.dtype, reduction)


def _forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> tuple[Tensor, Tensor]:
    _classes.require_known(target, x.shape[1], ignore_index)
    losses, row_weight = _classes.new_losses(x, x.dtype, reduction)
    n_rows = _classes.n_rows_of(x)
    config = Config({"ROWS": 16 if device_of(x).backend == "interpreter" else 128}, 4, 1)
    launch(
        NLL_LOSS_FWD, (cdiv(n_rows, config["ROWS"]),),
        x, target.contiguous(), None if weight is None else weight.contiguous(), losses, row_weight,
        n_rows, x.shape[1], _classes.inner_of(x), *_classes.strides(x), ignore_index, config=config,
    )  # fmt: skip
    return _classes.reduced(losses, x.dtype, reduction)


def _torch_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> tuple[Tensor, Tensor]:
    loss, sums = _like(x, target, weight, reduction, ignore_index)
    loss.copy_(definition(x, target, weight, reduction, ignore_index))
    _classes.put_sums(sums, loss, x, target, weight, ignore_index)
    return loss, sums


def _like_backward(dloss: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _backward(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, sums: Tensor, reduction: str,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    dx = torch.empty_like(x)
    config, n_rows = config_for(dx), _classes.n_rows_of(x)
    parts = cdiv(x.shape[1], config["BLOCK"])
    dloss, dloss_row = _classes.rows_first(dloss)
    launch(
        NLL_LOSS_BWD, (cdiv(n_rows, config["ROWS"]) * parts,),
        dloss, target.contiguous(), None if weight is None else weight.contiguous(),
        sums if reduction == "mean" else None, dx,
        n_rows, x.shape[1], _classes.inner_of(x), parts, *_classes.strides(dx), dloss_row,
        ignore_index, config=config,
    )  # fmt: skip
    return dx


def _torch_backward(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, sums: Tensor, reduction: str,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    args = (x, target, weight, reduction, ignore_index)
    return torch.empty_like(x).copy_(gradients(definition, args, dloss, [True])[0])


FORWARD = LibraryOp(
    "nll_loss", _forward, like=_like, torch_form=_torch_forward, decline=_classes.too_many
)
BACKWARD = LibraryOp(
    "nll_loss_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class NLLLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Any:
        loss, sums = FORWARD.overload(x, target, weight, *options)
        ctx.save_for_backward(x, target, weight, sums)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        x, target, weight, sums = ctx.saved_tensors
        if differentiating():
            args = (x, target, weight, *ctx.options)
            dx = second_derivative("nll_loss", definition, args, dloss, [True])[0]
        else:
            dx = BACKWARD.overload(dloss, x, target, weight, sums, *ctx.options)
        return dx, None, None, None, None


def _inference(*args: Any) -> Tensor:
    return FORWARD.overload(*args)[0]


def _decline(x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Reason | None:
    """Weights that are learned or of another dtype are torch's, which refuses them."""
    if weight is None or (weight.dtype == x.dtype and not weight.requires_grad):
        return None
    return Reason.OPTION


OP = Op("nll_loss", definition, NLLLossFunction, _inference, decline=_decline)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-weight input of each row's class: torch's negative log likelihood.

    An index that is no class raises on a CPU; on a GPU its loss is NaN.
    """
    reduction = reduction_of("nll_loss", size_average, reduce, reduction)
    _classes.check("nll_loss", input.shape, target, weight, ignore_index, probabilities=False)
    if in_autocast(input):
        wide = torch.promote_types(input.dtype, torch.float32)
        input, weight = input.to(wide), None if weight is None else weight.to(wide)
    return _classes.run_on_rows(OP, input, target, False, weight, reduction, ignore_index)

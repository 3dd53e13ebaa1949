"""Cross entropy of logits: class weights, smoothing, probabilities, z-loss and softcap."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _classes
from ._launch import Config, Device, Kernel, cdiv, device_of, launch, power_of_2
from ._op import (
    LibraryOp,
    Op,
    copied,
    differentiating,
    empty_gradients,
    gradients,
    second_derivative,
)
from ._reduction import reduction_of
from ._route import Reason

CROSS_ENTROPY_FWD = Kernel("cross_entropy.cross_entropy_fwd")
CROSS_ENTROPY_BWD = Kernel("cross_entropy.cross_entropy_bwd")


def _logits(x: Tensor, softcap: float, wide: bool) -> Tensor:
    z = x.to(torch.promote_types(x.dtype, torch.float32)) if wide else x
    return softcap * torch.tanh(z / softcap) if softcap else z


def definition(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    smoothing: float, z_loss: float, softcap: float, wide: bool,
) -> Tensor:  # fmt: skip
    """torch's cross entropy of z = softcap tanh(x / softcap), plus z_loss lse(z)² of each row that
    is not ignored. `wide` is in float32 of less.
    """
    z = _logits(x, softcap, wide)
    loss = F.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
    )
    if not z_loss:
        return loss
    square = torch.logsumexp(z, 1).square()
    if not target.is_floating_point():
        square = torch.where(target == ignore_index, 0.0, square)
    if reduction != "none":
        square = square.sum()
    if reduction == "mean":
        square = square / _classes.row_weights(z, target, weight, ignore_index).sum()
    return loss + z_loss * square


def dtype_of(x: Tensor, target: Tensor, weight: Tensor | None, wide: bool) -> torch.dtype:
    """The dtype of the loss."""
    dtype = torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
    for other in (target, weight) if target.is_floating_point() else ():
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return dtype


Outputs = tuple[Tensor, Tensor, Tensor]


def _like(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *options: Any
) -> Outputs:
    loss, sums = _classes.like_reduced(x, dtype_of(x, target, weight, options[-1]), reduction)
    return loss, x.new_empty((3, *_classes.row_shape(x)), dtype=torch.float32), sums


def choose(n_cols: int, strided: bool, device: Device) -> Config:
    """Tiles of rows by classes; longer rows are walked through. Rows side by side, as pixels are,
    make tiles of many rows.
    """
    return _rule(power_of_2(n_cols), strided, device)


@functools.lru_cache(maxsize=1024)
def _rule(cols: int, strided: bool, device: Device) -> Config:
    if device.backend == "interpreter":
        # a row is soon long, and blocks are small while rows are
        block = min(cols, 4096 if cols > 1024 else 8 if strided else 64)
        return Config({"ROWS": max(256 // block, 16), "BLOCK": block}, 4, 1)
    block = min(cols, 32 if strided else 4096)
    if block >= 1024:
        return Config({"ROWS": 1, "BLOCK": block}, block // 512, 1)
    # with several rows a thread has fewer elements: each of them has a pointer, or two
    rows = min(1024 // block, 128 if strided else 16)
    return Config({"ROWS": rows, "BLOCK": block}, max(1, rows * block // 128), 1)


def config_for(x: Tensor) -> Config:
    return choose(x.shape[1], x.stride(1) != 1 and x.shape[1] > 1, device_of(x))


def launch_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, losses: Tensor, row_weight: Tensor | None,
    stats: Tensor | None, dx: Tensor | None, ignore_index: int, smoothing: float, z_loss: float,
    softcap: float,
) -> None:  # fmt: skip
    """Fill the losses of rows, what they count and what backward needs; dx may be x."""
    config, probabilities = config_for(x), target.is_floating_point()
    n_rows, n_cols = _classes.n_rows_of(x), x.shape[1]
    target = target if probabilities else target.contiguous()
    launch(
        CROSS_ENTROPY_FWD, (cdiv(n_rows, config["ROWS"]),),
        x, target, None if weight is None else weight.contiguous(), losses, row_weight, stats, dx,
        n_rows, n_cols, _classes.inner_of(x),
        *_classes.strides(x), *_classes.strides(target if probabilities else None),
        0 if stats is None else stats.stride(0), ignore_index, smoothing or None, z_loss or None,
        softcap or None, PROBS=probabilities, config=config,
    )  # fmt: skip


def _forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    smoothing: float, z_loss: float, softcap: float, wide: bool,
) -> Outputs:  # fmt: skip
    if not target.is_floating_point():
        _classes.require_known(target, x.shape[1], ignore_index)
    dtype = dtype_of(x, target, weight, wide)
    stats = x.new_empty((3, *_classes.row_shape(x)), dtype=torch.float32)
    losses, row_weight = _classes.new_losses(x, dtype, reduction)
    launch_forward(
        x, target, weight, losses, row_weight, stats, None, ignore_index, smoothing, z_loss, softcap
    )
    loss, sums = _classes.reduced(losses, dtype, reduction)
    return loss, stats, sums


def _torch_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    smoothing: float, z_loss: float, softcap: float, wide: bool,
) -> Outputs:  # fmt: skip
    args = (x, target, weight, reduction, ignore_index, smoothing, z_loss, softcap, wide)
    loss, stats, sums = _like(*args)
    loss.copy_(definition(*args))
    if x.numel():
        stats.copy_(_statistics(_logits(x, softcap, True), target, weight, ignore_index, smoothing))
    _classes.put_sums(sums, loss, x, target, weight, ignore_index)
    return loss, stats, sums


def _statistics(
    z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> Tensor:
    """The largest z of each row, log(sum(exp(z - largest))), and the sum of what labels give."""
    largest = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
    log_sum = torch.logsumexp(z - largest.unsqueeze(1), 1)
    if target.is_floating_point():
        shares = target.to(z.dtype) * (1 - smoothing) + smoothing / z.shape[1]
        if weight is not None:
            shares = shares * weight.view(-1, *[1] * (z.dim() - 2))
        return torch.stack([largest, log_sum, shares.sum(1)])
    average = 1.0 if weight is None else weight.to(z.dtype).mean()
    given = (1 - smoothing) * _classes.row_weights(z, target, weight, ignore_index)
    total = torch.where(target == ignore_index, 0.0, given + smoothing * average)
    return torch.stack([largest, log_sum, total])


Gradients = tuple[Tensor, Tensor]


def _like_backward(dloss: Tensor, x: Tensor, target: Tensor, *rest: Any) -> Gradients:
    return empty_gradients((x, target), rest[-1], torch.preserve_format)


def launch_backward(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor,
    sums: Tensor | None, dx: Tensor | None, dtarget: Tensor | None, ignore_index: int,
    smoothing: float, z_loss: float, softcap: float,
) -> None:  # fmt: skip
    """Fill dx and dtarget; dx may be x."""
    config, probabilities = config_for(x), target.is_floating_point()
    n_rows, n_cols = _classes.n_rows_of(x), x.shape[1]
    parts = cdiv(n_cols, config["BLOCK"])
    dloss, dloss_row = _classes.rows_first(dloss)
    target = target if probabilities else target.contiguous()
    launch(
        CROSS_ENTROPY_BWD, (cdiv(n_rows, config["ROWS"]) * parts,),
        dloss, x, target, None if weight is None else weight.contiguous(), stats, sums, dx, dtarget,
        n_rows, n_cols, _classes.inner_of(x), parts,
        *_classes.strides(x), *_classes.strides(target if probabilities else None),
        *_classes.strides(dx), *_classes.strides(dtarget), dloss_row,
        stats.stride(0), ignore_index, smoothing or None, z_loss or None, softcap or None,
        PROBS=probabilities, config=config,
    )  # fmt: skip


def _backward(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, sums: Tensor,
    reduction: str, ignore_index: int, smoothing: float, z_loss: float, softcap: float, wide: bool,
    needs: list[bool],
) -> Gradients:  # fmt: skip
    dx, dtarget = _like_backward(dloss, x, target, needs)
    launch_backward(
        dloss, x, target, weight, stats, sums if reduction == "mean" else None, dx, dtarget,
        ignore_index, smoothing, z_loss, softcap,
    )  # fmt: skip
    return dx, dtarget


def _torch_backward(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Any, stats: Any, sums: Any, *rest: Any
) -> Gradients:
    *options, needs = rest
    found = gradients(definition, (x, target, weight, *options), dloss, needs)
    return copied(_like_backward(dloss, x, target, needs), found)


FORWARD = LibraryOp(
    "cross_entropy", _forward, like=_like, torch_form=_torch_forward, decline=_classes.too_many
)
BACKWARD = LibraryOp(
    "cross_entropy_backward", _backward, like=_like_backward, torch_form=_torch_backward
)


class CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Any:
        loss, stats, sums = FORWARD.overload(x, target, weight, *options)
        ctx.save_for_backward(x, target, weight, stats, sums)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        x, target, weight, stats, sums = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if differentiating():
            args = (x, target, weight, *ctx.options)
            found = second_derivative("cross_entropy", definition, args, dloss, needs)[:2]
        else:
            found = BACKWARD.overload(dloss, x, target, weight, stats, sums, *ctx.options, needs)
        return *found, *[None] * 7


def _inference(x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    return FORWARD.overload(x, target, weight, *options)[0]


def decline(x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Reason | None:
    """Weights that are learned are torch's, and so are dtypes that it refuses."""
    if weight is None:
        return None
    learned = torch.is_grad_enabled() and weight.requires_grad
    refused = not target.is_floating_point() and weight.dtype != dtype_of(
        x, target, weight, options[-1]
    )
    return Reason.OPTION if learned or refused else None


OP = Op("cross_entropy", definition, CrossEntropyFunction, _inference, decline=decline)


def in_autocast(input: Tensor) -> bool:
    """Whether torch's autocast computes losses in float32: on a CPU too."""
    device = input.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def check(
    op: str, shape: tuple[int, ...], target: Tensor, weight: Tensor | None, ignore_index: int,
    smoothing: float,
) -> bool:  # fmt: skip
    """Raise where torch would. Says whether the target is of probabilities."""
    if smoothing > 1:
        raise RuntimeError(f"{op}: label_smoothing is {smoothing}, it must be between 0 and 1")
    if not shape:
        raise RuntimeError(f"{op}: input is (); it must have a dimension of classes")
    return _classes.check(op, shape, target, weight, ignore_index)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """torch's cross entropy of softcap tanh(input / softcap), plus z_loss lse² of each row that is
    not ignored, reduced like the loss.

    An index that is no class raises on a CPU; on a GPU its loss is NaN.
    """
    reduction = reduction_of("cross_entropy", size_average, reduce, reduction)
    return run(
        input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap,
        in_autocast(input),
    )  # fmt: skip


def run(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    smoothing: float, z_loss: float, softcap: float, wide: bool,
) -> Tensor:  # fmt: skip
    """The op, on rows."""
    probabilities = check("cross_entropy", input.shape, target, weight, ignore_index, smoothing)
    if weight is not None and in_autocast(input):
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _classes.run_on_rows(
        OP, input, target, probabilities, weight, reduction, ignore_index,
        max(float(smoothing), 0.0), float(z_loss), float(softcap), wide,
    )  # fmt: skip
